"""Predictions, labels or inputs of all batches of an evaluation, nested as the first batch was.

Owns: `EvalLoopContainer`: a buffer per leaf, or a list of batches. Leaves to others: the rows of one leaf (`buffers`),
counting samples (`accumulator`). Name and signature: `trainer_pt_utils`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trainwright import nested
from trainwright.evaluation.buffers import ArrayBuffer, ListBuffer, add_to
from trainwright.evaluation.spill import MemoryBudget
from trainwright.names import IGNORE_INDEX
from trainwright.nested import Nested, lists_samples, numpify

Array = np.ndarray[Any, Any]


class EvalLoopContainer:
    """Stores the nested tensors of every evaluation batch until `get_arrays`.

    do_nested_concat: one array per leaf with all samples; False: a list with one entry per batch.
    padding_index: what fills the right of dimension 1 where batches differ in width.
    budget: bytes beyond which rows go to files; it holds for `do_nested_concat` only. token_padding: what fills rows of
    integers instead, where these are tokens.
    """

    def __init__(
        self,
        do_nested_concat: bool = True,
        padding_index: int = IGNORE_INDEX,
        *,
        budget: MemoryBudget | None = None,
        token_padding: int | None = None,
    ) -> None:
        self.do_nested_concat = do_nested_concat
        self.padding_index, self.token_padding = padding_index, token_padding
        self.budget = budget
        self._buffers: Nested = None  # an ArrayBuffer per leaf, nested as the first batch was; a ListBuffer per list
        self._batches: list[Nested] = []  # of do_nested_concat=False
        self._num_on_host = 0  # how many of `_batches` are arrays already

    def add(self, tensors: Nested, num_rows: int | None = None) -> None:
        """Append one batch; tensors stay on their device. None, what a dataset without labels gives, adds nothing.

        num_rows: the samples of the batch. Without it no list is taken for one with an entry per sample.

        Raises ValueError for None after a batch that had something: rows would no longer belong to samples.
        """
        if tensors is None:
            if self._buffers is not None or self._batches:
                raise ValueError("earlier batches gave predictions, labels or inputs here, this one gave None.")
            return
        if not self.do_nested_concat:
            self._batches.append(tensors)
            return
        if self._buffers is None:
            self._buffers = self._new_buffers(tensors, num_rows)
        if type(self._buffers) is ArrayBuffer:
            self._buffers.add(tensors)
        else:
            self._buffers = add_to(self._buffers, tensors, num_rows)

    def _new_buffers(self, tensors: Nested, num_rows: int | None = None) -> Nested:
        """Empty buffers for what is nested as `tensors` are."""
        if type(tensors) is list and num_rows is not None and lists_samples(tensors, num_rows) is not False:
            return ListBuffer(self._new_buffers)
        if isinstance(tensors, (list, tuple, Mapping)):
            return nested.map_items(lambda value: self._new_buffers(value, num_rows), tensors)
        return ArrayBuffer(self.padding_index, self.budget, self.token_padding)

    def add_alike(self, batches: Sequence[torch.Tensor]) -> None:
        """`add` each of these, which have one shape and dtype and are no slices. Only with `do_nested_concat`."""
        if self._buffers is None:
            self._buffers = self._new_buffers(batches[0])
        if type(self._buffers) is ArrayBuffer:
            self._buffers.add_alike(batches)
        else:
            self.add(batches[0])  # a tensor after a nesting of them: says what is wrong

    def to_cpu_and_numpy(self) -> None:
        """Move what was added since the last call to the host. Waits for the device."""
        if self.do_nested_concat:
            if self._buffers is not None:
                nested.map(lambda buffer: buffer.to_host(), self._buffers)
            return
        for index in range(self._num_on_host, len(self._batches)):
            self._batches[index] = nested.map(numpify, self._batches[index])
        self._num_on_host = len(self._batches)

    def get_arrays(
        self, positions: Array | None = None, num_rows: int | None = None, limit: int | None = None
    ) -> Nested:
        """What was added as arrays (without concatenation, a list with an entry per batch); None where nothing was.

        positions: where each row belongs, for leaves that have `num_rows` rows (`ArrayBuffer.array`); of these at most
        `limit` are returned.
        """
        if self.do_nested_concat:
            if self._buffers is None:
                return None
            return nested.map(lambda buffer: buffer.rows(positions, num_rows, limit), self._buffers)
        self.to_cpu_and_numpy()
        return self._batches or None
