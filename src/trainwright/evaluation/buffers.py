"""Collect what each evaluation batch returned and join it once.

Owns: rows of many batches, in linear time: a batch is held where it is, and its rows are copied once, into an array
allocated with the final number of rows and the final padded width. (Appending to a growing array copies up to twice as
much and holds twice the memory while it grows.) Leaves to others: a nesting of them (`prediction_store`), one pair of
batches (`nested.nested_concat`, whose repeated result this equals bit for bit), rows beyond the memory budget
(`spill`) and other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trainwright import nested
from trainwright.evaluation.spill import MemoryBudget, RowsFile, place
from trainwright.names import IGNORE_INDEX
from trainwright.nested import Nested, atleast_1d, fill_for, lists_samples, numpify, padding_for, rebuild, with_room_for

Array = np.ndarray[Any, Any]

# Below this, batches on a device are joined there and cross in one transfer, which costs a second copy of them there.
# Above it each batch crosses by itself: the transfers are large enough, and the device holds nothing twice.
ONE_TRANSFER_BYTES = 64 * 2**20
ROWS_AT_ONCE = 1024  # that are in memory when a file has to change its dtype, which is rare
BATCHES_AT_ONCE = 32  # that one call joins; they are held twice until it returns


class ArrayBuffer:
    """The batches of one leaf: tensors on any device, or arrays; or None in every batch.

    The dtype follows `nested_concat`: batches of one width promote, one of another width is cast to the dtype so far,
    which then has room for the padding (`with_room_for`).
    """

    def __init__(
        self, padding_index: int = IGNORE_INDEX, budget: MemoryBudget | None = None, token_padding: int | None = None
    ) -> None:
        self.padding_index, self.token_padding = padding_index, token_padding
        self.budget = budget
        if budget is not None:
            budget.register(self)
        # Batches (rows, width, ...), the newest ones, that have not reached the host.
        self._on_device: list[torch.Tensor] = []
        self._on_host: list[Any] = []  # batches before them, all tensors or all arrays
        self._file: RowsFile | None = None  # batches before those, where they are too many for main memory
        self._is_none = False
        self._is_tensor = True
        self._dtype: Any = None  # of all batches; None before the first one
        self._row_shape: Any = None  # of the last batch: all but its first dimension
        self._width = 0  # widest so far; 0 where leaves have one dimension
        self.num_rows = 0

    def add(self, leaf: Any) -> None:
        """Append one batch (rows, ...), or a scalar as one row; or None where every batch is None.

        Raises TypeError or ValueError where it cannot join the batches before it.
        """
        if not (
            type(leaf) is torch.Tensor
            and leaf.ndim
            and leaf.dtype is self._dtype
            and leaf.shape[1:] == self._row_shape
            and not leaf.requires_grad
        ):
            leaf = self._checked(leaf)  # rare: the first batch, or one that differs
            if leaf is None:
                return
        if self._is_tensor:
            if type(leaf) is torch.Tensor and leaf.untyped_storage().nbytes() > leaf.nbytes:
                leaf = leaf.clone()  # a slice of the logits would keep all of them alive
            if not leaf.is_cpu:
                self._on_device.append(leaf)
                self.num_rows += leaf.shape[0]
                return
        if self._on_device:
            self.to_host()
        self.num_rows += leaf.shape[0]
        self._on_host.append(leaf)
        budget = self.budget
        if budget is not None:  # `hold`, without a call per batch
            budget.held_bytes += leaf.nbytes
            if budget.held_bytes > budget.limit_bytes:
                budget.write_out()

    def add_alike(self, leaves: Sequence[torch.Tensor]) -> None:
        """Append batches of one shape and dtype, none of them a slice, as `add` would one after the other."""
        first, *rest = leaves
        self.add(first)
        if first.dtype is not self._dtype or {leaf.device for leaf in rest} - {first.device}:
            for leaf in rest:  # they have to be cast or moved
                self.add(leaf)
            return
        (self._on_host if first.is_cpu else self._on_device).extend(rest)
        self.num_rows += len(rest) * first.shape[0]
        if first.is_cpu and self.budget is not None:
            self.budget.hold(len(rest) * first.nbytes)

    def _checked(self, leaf: Any) -> Any:
        """`leaf` as a tensor or array that fits the batches so far, in their dtype; None for one that adds nothing."""
        if self._is_none or (leaf is None and self._dtype is None):
            if leaf is not None:
                raise TypeError(f"batches differ in structure: None, then a {type(leaf).__name__}. {KEEP_APART}")
            self._is_none = True
            return None
        if not isinstance(leaf, (torch.Tensor, np.ndarray)):
            raise TypeError(
                f"cannot collect a {type(leaf).__name__}; predictions and labels must be tensors, arrays or "
                "nestings of them. Name other outputs in `ignore_keys`, or set eval_do_concat_batches=False."
            )
        leaf = atleast_1d(leaf.detach() if isinstance(leaf, torch.Tensor) else leaf)
        width = leaf.shape[1] if leaf.ndim > 1 else 0
        if self._dtype is None:
            self._is_tensor, self._dtype = isinstance(leaf, torch.Tensor), leaf.dtype
        else:
            leaf = self._fit(leaf, width)
        self._row_shape = leaf.shape[1:]
        self._width = max(self._width, width)
        return leaf

    def _fit(self, leaf: Any, width: int) -> Any:
        """`leaf` in the dtype of the batches so far, or those batches in the dtype that both promote to."""
        if isinstance(leaf, torch.Tensor) is not self._is_tensor:
            kinds = ("Tensor", "ndarray") if self._is_tensor else ("ndarray", "Tensor")
            raise TypeError(f"one batch gave a {kinds[0]}, a later one a {kinds[1]}.")
        if leaf.ndim != len(self._row_shape) + 1 or leaf.shape[2:] != self._row_shape[1:]:
            raise ValueError(
                f"a batch of shape {tuple(leaf.shape)} cannot join batches of shape (rows, "
                f"{', '.join(map(str, self._row_shape))}): dimensions 0 "
                "(samples) and 1 (padded on the right) may differ, others not. "
                "eval_do_concat_batches=False keeps batches apart."
            )
        dtype = self._dtype
        if leaf.dtype != dtype and (width == self._width or _is_text(dtype)):
            promote: Any = torch.promote_types if self._is_tensor else np.promote_types
            dtype = promote(dtype, leaf.dtype)
        if width != self._width:
            dtype = with_room_for(dtype, padding_for(dtype, self.padding_index, self.token_padding))
        if dtype != self._dtype:
            self._recast(dtype)
        return leaf if leaf.dtype == dtype else _cast(leaf, dtype)

    def _recast(self, dtype: Any) -> None:
        """Bring the batches so far into `dtype`. Their padding is cast with them, so they are padded first."""
        self._dtype = dtype
        if self._file is not None:
            self.to_host()
            self.flush()
            padded, self._file = self._file.mapped(self._final_row_shape(), self._fill()), None
            for start in range(0, len(padded), ROWS_AT_ONCE):
                rows = np.array(padded[start : start + ROWS_AT_ONCE])
                self._on_host.append(_cast(torch.from_numpy(rows) if self._is_tensor else rows, dtype))
                self._hold(self._on_host[-1])
                self.flush()
        elif self._on_device and not self._on_host:
            self._on_device = [_cast(self._joined_on_device(self._on_device), dtype)]
        else:
            self.to_host()
            joined = self._joined(None)
            self._on_host = [_cast(torch.from_numpy(joined) if self._is_tensor else joined, dtype)]
            self._hold(self._on_host[0])

    def _hold(self, batch: Any) -> None:
        if self.budget is not None:
            self.budget.hold(batch.nbytes)

    def _joined_on_device(self, batches: list[torch.Tensor]) -> torch.Tensor:
        rows = sum(batch.shape[0] for batch in batches)
        joined = batches[0].new_empty((rows, *self._final_row_shape()))
        _copy_all(joined, batches, self._fill())
        return joined

    def to_host(self) -> None:
        """Move batches that lie on a device to the host."""
        moving, self._on_device = self._on_device, []
        if len(moving) > 1 and sum(batch.nbytes for batch in moving) <= ONE_TRANSFER_BYTES:
            moving = [self._joined_on_device(moving)]
        moving.reverse()
        while moving:
            self._on_host.append(moving.pop().cpu())
            self._hold(self._on_host[-1])

    def flush(self) -> None:
        """Write the batches in main memory to a file, and forget them."""
        if not self._on_host:
            return
        assert self.budget is not None
        if self._file is None:
            self._file = RowsFile(self.budget.directory)
        self._on_host.reverse()
        while self._on_host:
            batch = self._on_host.pop()
            self._file.write(numpify(batch))
            self.budget.release(batch.nbytes)

    def array(self, positions: Array | None = None) -> Array | None:
        """All rows, (num_samples, width, ...), on the host; bfloat16 becomes float32. A single batch is not copied.

        positions: the place of each row among the `len(positions)` rows of the result; rows beyond them are left out.
        Without it the result has all rows in the order they came in, and more can be added afterwards.
        """
        if self._dtype is None:
            return None
        self.to_host()
        if self._file is not None:
            self.flush()
            array = self._file.mapped(self._final_row_shape(), self._fill(), positions)
            self._file = None
        else:
            array = self._joined(positions)
        self._on_host = [torch.from_numpy(array) if self._is_tensor else array]
        self._dtype = self._on_host[0].dtype
        self.num_rows = len(array)
        return array

    def _joined(self, positions: Array | None) -> Array:
        """The batches in main memory as one array. Forgets them as it copies, so that memory stays flat."""
        batches, self._on_host = self._on_host, []
        if self.budget is not None:
            self.budget.release(sum([batch.nbytes for batch in batches]))
        first = numpify(batches[0])
        if positions is not None:
            placed: Array = np.empty((len(positions), *self._final_row_shape()), first.dtype)
            target, where = (torch.from_numpy(a) if self._is_tensor else a for a in (placed, positions))
            batches.reverse()
            start = 0
            while batches:
                rows = batches.pop()
                place(target, _cast(rows, target.dtype), start, self._fill(), where)
                start += rows.shape[0]
            return placed
        if len(batches) == 1:
            return first  # type: ignore[no-any-return]
        # Allocated by NumPy, which asks for huge pages: new memory costs half as much to touch as torch's.
        joined: Array = np.empty((self.num_rows, *self._final_row_shape()), first.dtype)
        _copy_all(torch.from_numpy(joined) if self._is_tensor else joined, batches, self._fill())
        return joined

    def _fill(self) -> Any:
        return fill_for(self._dtype, padding_for(self._dtype, self.padding_index, self.token_padding))

    def rows(self, positions: Array | None, num_rows: int | None, limit: int | None) -> Array | None:
        """`array`, in the order of `positions` and at most `limit` rows, where its rows are the `num_rows` samples."""
        array = self.array(positions if self.num_rows == num_rows else None)
        if array is None or limit is None or num_rows is None or limit >= num_rows or len(array) != num_rows:
            return array
        return array[:limit]

    def _final_row_shape(self) -> tuple[int, ...]:
        return (self._width, *self._row_shape[1:]) if len(self._row_shape) else ()


KEEP_APART = "eval_do_concat_batches=False keeps batches apart."


class ListBuffer:
    """A list in every batch: an entry for each sample, or always the same outputs. The batches tell which, together.

    Entries of samples may be anything and stay what they are, but tensors become arrays; they are never written to
    files. new_buffers: what a nesting of outputs is put into.
    """

    def __init__(self, new_buffers: Callable[[Nested], Nested]) -> None:
        self._new_buffers = new_buffers
        self._batches: list[tuple[list[Any], int]] = []  # with the samples of each, where these may be samples
        self._num_on_host = 0
        self._outputs: Nested = None  # buffers, where these are outputs

    def add(self, values: Nested, num_rows: int | None) -> None:
        """Append the list of a batch of `num_rows` samples."""
        if self._outputs is not None:
            self._outputs = add_to(self._outputs, values, num_rows)
        elif lists_samples(values, num_rows) is not False and num_rows is not None:
            self._batches.append((values, num_rows))
        elif any(lists_samples(*batch) for batch in self._batches):
            kind = f"{len(values)} entries" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
            raise ValueError(
                f"the first batches gave a list with an entry for each sample, a later batch of {num_rows} samples "
                f"gave {kind}. {KEEP_APART}"
            )
        else:
            self._become_outputs()
            self.add(values, num_rows)

    def _become_outputs(self) -> None:
        batches, self._batches = self._batches, []
        self._outputs = [self._new_buffers(value) for value in batches[0][0]]
        for values, num_rows in batches:
            self._outputs = add_to(self._outputs, values, num_rows)

    def to_host(self) -> None:
        """Move entries that lie on a device to the host."""
        if self._outputs is not None:
            nested.map(lambda buffer: buffer.to_host(), self._outputs)
        for index in range(self._num_on_host, len(self._batches)):
            values, num_rows = self._batches[index]
            self._batches[index] = (nested.map(numpify, values), num_rows)
        self._num_on_host = len(self._batches)

    def rows(self, positions: Array | None, num_rows: int | None, limit: int | None) -> Nested:
        """A list with an entry per sample, in the order of `positions` and at most `limit`; or a list of arrays."""
        if self._outputs is None and not self._are_samples():
            self._become_outputs()
        if self._outputs is not None:
            return nested.map(lambda buffer: buffer.rows(positions, num_rows, limit), self._outputs)
        self.to_host()
        entries = [entry for values, _ in self._batches for entry in values]
        if len(entries) != num_rows:
            return entries
        if positions is not None:
            ordered: list[Any] = [None] * len(positions)
            for position, entry in zip(positions, entries):
                ordered[position] = entry
            entries = ordered
        return entries[:limit]

    def _are_samples(self) -> bool:
        """Lists as long as batches that differ in length are of samples; so are dicts, where nothing tells."""
        return (
            len({num_rows for _, num_rows in self._batches}) > 1
            or any(lists_samples(*batch) for batch in self._batches)
            or isinstance(self._batches[0][0][0], Mapping)
        )


def _is_text(dtype: Any) -> bool:
    return getattr(dtype, "kind", "") in ("U", "S")


def _copy_all(target: Any, batches: list[Any], padding_index: Any) -> None:
    """Fill `target` with the rows of `batches`, all tensors or all arrays, and empty the list on the way."""
    concatenate: Any = torch.cat if isinstance(target, torch.Tensor) else np.concatenate
    batches.reverse()
    start = 0
    while batches:
        some = batches[: -BATCHES_AT_ONCE - 1 : -1]
        del batches[-BATCHES_AT_ONCE:]
        rows = sum([batch.shape[0] for batch in some])
        part = target[start : start + rows]
        start += rows
        shapes = {batch.shape[1:] for batch in some}
        if shapes == {part.shape[1:]} and {batch.dtype for batch in some} == {part.dtype}:
            concatenate(some, out=part)
            continue
        row = 0
        for batch in some:
            own = part[row : row + batch.shape[0]]
            row += batch.shape[0]
            if batch.ndim > 1 and batch.shape[1] < own.shape[1]:
                own[:, batch.shape[1] :] = padding_index
                own = own[:, : batch.shape[1]]
            own[...] = batch


def _cast(leaf: Any, dtype: Any) -> Any:
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) else leaf.astype(dtype)


def add_to(buffers: Nested, tensors: Nested, num_rows: int | None = None) -> Nested:
    """Add each leaf to its buffer. A mapping keeps the keys of the first batch. Raises where a sequence has another
    length than in the first batch: its entries would be lost.
    """
    if type(buffers) is ArrayBuffer:
        buffers.add(tensors)
        return buffers
    if type(buffers) is ListBuffer:
        buffers.add(tensors, num_rows)
        return buffers
    if type(buffers) is not type(tensors):
        kinds = f"a nesting of {type(buffers).__name__}, then of {type(tensors).__name__}"
        raise TypeError(f"batches differ in structure: {kinds}. {KEEP_APART}")
    if isinstance(buffers, (dict, Mapping)):  # dict first: the check of an abstract class costs calls
        if missing := [key for key in buffers if key not in tensors]:
            raise KeyError(f"a batch lacks the outputs {missing} that the first one had; it has {list(tensors)}.")
        joined = {key: add_to(buffer, tensors[key], num_rows) for key, buffer in buffers.items()}
        return buffers if joined == dict(buffers) else type(buffers)(joined)  # type: ignore[call-arg]
    if len(buffers) != len(tensors):
        raise ValueError(f"one batch gave {len(buffers)} outputs, a later one {len(tensors)}. {KEEP_APART}")
    added = [add_to(buffer, tensor, num_rows) for buffer, tensor in zip(buffers, tensors)]
    return buffers if added == list(buffers) else rebuild(buffers, added)
