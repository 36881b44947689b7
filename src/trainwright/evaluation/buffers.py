"""Collect what each evaluation batch returned and join it once.

Owns: rows of many batches, in linear time: a batch is kept where it is, and its rows are copied once, into an array
allocated with the final number of rows and the final padded width. (Appending to a growing array copies up to twice as
much and holds twice the memory while it grows.) Leaves to others: one pair of batches (`tensors.nested_concat`, whose
repeated result this equals bit for bit) and other processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trainwright.evaluation.tensors import Nested, atleast_1d, map_leaves, numpify, rebuild
from trainwright.names import IGNORE_INDEX

Array = np.ndarray[Any, Any]

# Below this, batches on a device are joined there and cross in one transfer, which costs a second copy of them there.
# Above it each batch crosses by itself: the transfers are large enough, and the device holds nothing twice.
ONE_TRANSFER_BYTES = 64 * 2**20


class ArrayBuffer:
    """The batches of one leaf: tensors on any device, or arrays.

    The dtype follows `nested_concat`: batches of one width promote, one of another width is cast to the dtype so far.
    """

    def __init__(self, padding_index: int = IGNORE_INDEX) -> None:
        self.padding_index = padding_index
        self._batches: list[Any] = []  # each (rows, width, ...), all tensors or all arrays, of one dtype
        self._num_on_host = 0  # how many of the first batches `to_host` has seen
        self._width = 0  # widest so far; 0 where leaves have one dimension

    def add(self, leaf: Any) -> None:
        """Append one batch (rows, ...), or a scalar as one row. Raises TypeError or ValueError where it cannot join."""
        if not isinstance(leaf, (torch.Tensor, np.ndarray)):
            raise TypeError(
                f"cannot collect a {type(leaf).__name__}; predictions and labels must be tensors, arrays or "
                "nestings of them. Name other outputs in `ignore_keys`, or set eval_do_concat_batches=False."
            )
        leaf = atleast_1d(leaf.detach() if isinstance(leaf, torch.Tensor) else leaf)
        if type(leaf) is torch.Tensor and leaf.untyped_storage().nbytes() > leaf.nbytes:
            leaf = leaf.clone()  # a slice of the logits would keep all of them alive
        width = leaf.shape[1] if leaf.ndim > 1 else 0
        if self._batches:
            leaf = self._fit(leaf, width)
        self._width = max(self._width, width)
        self._batches.append(leaf)

    def _fit(self, leaf: Any, width: int) -> Any:
        """`leaf` in the dtype of the batches so far, or those batches in the dtype that both promote to."""
        first = self._batches[0]
        if isinstance(first, torch.Tensor) is not isinstance(leaf, torch.Tensor):
            raise TypeError(f"one batch gave a {type(first).__name__}, a later one a {type(leaf).__name__}.")
        if first.ndim != leaf.ndim or first.shape[2:] != leaf.shape[2:]:
            raise ValueError(
                f"a batch of shape {tuple(leaf.shape)} cannot join batches of shape {tuple(first.shape)}: dimensions 0 "
                "(samples) and 1 (padded on the right) may differ, others not. "
                "eval_do_concat_batches=False keeps batches apart."
            )
        if first.dtype == leaf.dtype:
            return leaf
        if width == self._width:
            promote: Any = torch.promote_types if isinstance(leaf, torch.Tensor) else np.promote_types
            dtype = promote(first.dtype, leaf.dtype)
            if dtype != first.dtype:  # padding is cast with its rows, so pad before the dtype changes
                self._batches = [_cast(self._join(self._batches), dtype)]
                self._num_on_host = 0
        else:
            dtype = first.dtype
        return _cast(leaf, dtype)

    def to_host(self) -> None:
        """Move batches that lie on a device to the host."""
        new = self._batches[self._num_on_host :]
        if new and isinstance(new[-1], torch.Tensor) and new[-1].device.type != "cpu":
            if sum(batch.nbytes for batch in new) <= ONE_TRANSFER_BYTES:
                new = [self._join(new)]
            self._batches[self._num_on_host :] = [batch.cpu() for batch in new]
        self._num_on_host = len(self._batches)

    def array(self) -> Array:
        """All rows, (num_samples, width, ...), on the host; bfloat16 becomes float32. A single batch is not copied."""
        self.to_host()
        joined = self._join(self._batches)
        array: Array = numpify(joined)
        self._batches = [torch.from_numpy(array) if isinstance(joined, torch.Tensor) else array]
        self._num_on_host = 1
        return array

    def _join(self, batches: list[Any]) -> Any:
        """One tensor or array of all `batches`. Empties the list as it copies, so that memory stays flat."""
        first = batches[0]
        if len(batches) == 1:
            return first
        shape = (sum(map(len, batches)), *((self._width,) if first.ndim > 1 else ()), *first.shape[2:])
        is_tensor = isinstance(first, torch.Tensor)
        joined: Any = first.new_empty(shape) if is_tensor else np.empty(shape, dtype=first.dtype)
        del first
        batches.reverse()
        start = 0
        while batches:
            batch = batches.pop()
            target = joined[start : start + len(batch)]
            if batch.ndim > 1 and batch.shape[1] < self._width:
                target[:, batch.shape[1] :] = self.padding_index
                target = target[:, : batch.shape[1]]
            target[...] = batch
            start += len(batch)
        return joined


def _cast(leaf: Any, dtype: Any) -> Any:
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) else leaf.astype(dtype)


class EvalLoopContainer:
    """Keeps the nested tensors of every evaluation batch until `get_arrays`.

    do_nested_concat: one array per leaf with all samples; False: a list with one entry per batch.
    padding_index: what fills the right of dimension 1 where batches differ in width.
    """

    def __init__(self, do_nested_concat: bool = True, padding_index: int = IGNORE_INDEX) -> None:
        self.do_nested_concat = do_nested_concat
        self.padding_index = padding_index
        self._buffers: Nested = None  # an ArrayBuffer per leaf, nested as the first batch was
        self._batches: list[Nested] = []  # of do_nested_concat=False
        self._num_on_host = 0  # how many of `_batches` are arrays already

    def add(self, tensors: Nested) -> None:
        """Append one batch; tensors stay on their device. None, what a dataset without labels gives, adds nothing.

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
            self._buffers = map_leaves(lambda leaf: ArrayBuffer(self.padding_index), tensors)
        self._buffers = _add(self._buffers, tensors)

    def to_cpu_and_numpy(self) -> None:
        """Move what was added since the last call to the host. Waits for the device."""
        if self.do_nested_concat:
            map_leaves(lambda buffer: buffer.to_host() if buffer is not None else None, self._buffers)
            return
        for index in range(self._num_on_host, len(self._batches)):
            self._batches[index] = map_leaves(numpify, self._batches[index])
        self._num_on_host = len(self._batches)

    def get_arrays(self) -> Nested:
        """What was added as arrays (without concatenation, a list with an entry per batch); None where nothing was."""
        if self.do_nested_concat:
            return map_leaves(lambda buffer: buffer.array() if buffer is not None else None, self._buffers)
        self.to_cpu_and_numpy()
        return self._batches or None


def _add(buffers: Nested, tensors: Nested) -> Nested:
    """Add each leaf to its buffer. A sequence keeps the length of the shortest, a mapping the keys of the first."""
    if isinstance(buffers, ArrayBuffer):
        if tensors is not None or buffers._batches:
            buffers.add(tensors)
            return buffers
        return None  # this output is None in every batch
    if buffers is None and tensors is None:
        return None
    if type(buffers) is not type(tensors):
        kinds = f"a nesting of {type(buffers).__name__}, then of {type(tensors).__name__}"
        raise TypeError(f"batches differ in structure: {kinds}. eval_do_concat_batches=False keeps batches apart.")
    if isinstance(buffers, Mapping):
        if missing := [key for key in buffers if key not in tensors]:
            raise KeyError(f"a batch lacks the outputs {missing} that the first one had; it has {list(tensors)}.")
        return type(buffers)({key: _add(buffer, tensors[key]) for key, buffer in buffers.items()})  # type: ignore[call-arg]
    return rebuild(buffers, [_add(buffer, tensor) for buffer, tensor in zip(buffers, tensors)])
