"""Rows that do not fit into main memory: a file per array, which the finished array is a map of.

Owns: how much an evaluation may hold (`MemoryBudget`), and one file of rows (`RowsFile`). Leaves to others: which rows
there are and when they reach the host (`buffers`).

The files have no name: the system frees them when the last array that maps them is gone, also after a SIGKILL, so there
is nothing to clean up. They do not show in a directory listing; `df` shows them.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
GIB = 2**30
COPY_BYTES = 16 * 2**20  # of rows that are in memory at once while a file is rearranged


class Flushable(Protocol):
    """What holds rows in memory and can write them to a file."""

    def flush(self) -> None:
        """Write all rows that lie in main memory to a file, and forget them."""


class MemoryBudget:
    """Bytes of rows that all buffers of one evaluation hold in main memory, and what happens at the limit.

    limit_bytes: beyond it every buffer writes its rows to a file in `directory`; then counting begins again.
    """

    def __init__(self, limit_bytes: float, directory: str | os.PathLike[str]) -> None:
        self.limit_bytes = limit_bytes
        self.directory = os.fspath(directory)
        self.held_bytes = 0
        self._buffers: weakref.WeakSet[Flushable] = weakref.WeakSet()  # they hold the budget
        self._has_warned = False

    @classmethod
    def of_run(cls, limit_gib: float | None, output_dir: str, num_processes: int = 1) -> MemoryBudget | None:
        """The budget that `eval_memory_budget_gib` asks for, files in `output_dir`; None where there is no limit.

        A limit of None is half of the memory that is free now, shared by the `num_processes` of this machine. That is
        no limit where the system does not say how much is free.
        """
        if limit_gib is None:
            available = available_bytes()
            if available is None:
                return None
            limit_gib = available / GIB / 2 / max(1, num_processes)
        if limit_gib == float("inf"):
            return None
        usable = os.path.isdir(output_dir) and os.access(output_dir, os.W_OK)
        return cls(limit_gib * GIB, output_dir if usable else tempfile.gettempdir())

    def register(self, buffer: Flushable) -> None:
        """Make `buffer` one of those that are written out at the limit."""
        self._buffers.add(buffer)

    def hold(self, num_bytes: int) -> None:
        """Count rows that came into main memory; write out what all buffers hold where that is too much."""
        self.held_bytes += num_bytes
        if self.held_bytes > self.limit_bytes:
            self.write_out()

    def write_out(self) -> None:
        """Let every buffer write its rows to its file."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "Predictions and labels need more than the %.3g GiB of eval_memory_budget_gib: they are kept in files "
                "in %s, and arrive as memory maps. preprocess_logits_for_metrics can keep less of each batch.",
                self.limit_bytes / GIB,
                self.directory,
            )
        for buffer in list(self._buffers):
            buffer.flush()

    def release(self, num_bytes: int) -> None:
        """Count rows that left main memory."""
        self.held_bytes -= num_bytes


class RowsFile:
    """Rows of one array in a file, written batch by batch and mapped at the end.

    Batches have one dtype, and may differ in dimension 1.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._file = _nameless_file(directory)
        self._runs: list[tuple[tuple[int, ...], np.dtype[Any]]] = []  # shape (rows, ...) and dtype, in file order

    @property
    def num_rows(self) -> int:
        return sum(shape[0] for shape, _ in self._runs)

    def write(self, rows: Array) -> None:
        """Append `rows` (n, ...). Raises OSError that says what to do where the disk is full."""
        try:
            if rows.size:
                self._file.write(np.ascontiguousarray(rows).data.cast("B"))
        except OSError as error:
            raise _no_room(error, self.directory) from error
        if self._runs and self._runs[-1][0][1:] == rows.shape[1:] and self._runs[-1][1] == rows.dtype:
            shape, dtype = self._runs.pop()
            self._runs.append(((shape[0] + rows.shape[0], *shape[1:]), dtype))
        else:
            self._runs.append((rows.shape, rows.dtype))

    def mapped(self, row_shape: tuple[int, ...], padding_index: Any, positions: Array | None = None) -> Array:
        """All rows as one memory map (num_rows, *row_shape), padded on the right of dimension 1.

        positions: where each row belongs, as in `buffers.ArrayBuffer.array`. The file itself is mapped where rows lie
        as they must already, else a copy.
        """
        self._file.flush()
        dtype = self._runs[0][1]
        if positions is None and self._runs == [((self.num_rows, *row_shape), dtype)]:
            return np.memmap(self._file, dtype, "r+", shape=(self.num_rows, *row_shape))
        num_rows = self.num_rows if positions is None else len(positions)
        try:
            target: Array = np.memmap(_nameless_file(self.directory), dtype, "w+", shape=(num_rows, *row_shape))
        except OSError as error:
            raise _no_room(error, self.directory) from error
        start = 0
        for rows in self.blocks():
            place(target, rows, start, padding_index, positions)
            start += len(rows)
        return target

    def blocks(self) -> Iterator[Array]:
        """The rows again as they were written, a few at a time."""
        self._file.seek(0)
        for (num_rows, *rest), dtype in self._runs:
            row_bytes = max(1, dtype.itemsize * int(np.prod(rest, dtype=np.int64)))
            at_once = max(1, COPY_BYTES // row_bytes)
            for first in range(0, num_rows, at_once):
                shape = (min(at_once, num_rows - first), *rest)
                content = self._file.read(dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
                yield np.frombuffer(bytearray(content), dtype).reshape(shape)


def place(target: Any, rows: Any, start: int, padding_index: Any, positions: Any) -> None:
    """Write `rows`, the `start`-th and following of all, into `target`: in a row, or where `positions` says.

    All are arrays, or all are tensors. positions: None, or the row of `target` for each of all rows.
    """
    where: Any = slice(start, start + rows.shape[0])
    if positions is not None:
        where = positions[where]
        rows = rows[: where.shape[0]]  # beyond them are samples that were repeated to fill a batch
    if rows.ndim > 1 and rows.shape[1] < target.shape[1]:
        target[where, rows.shape[1] :] = padding_index
        target[where, : rows.shape[1]] = rows
    else:
        target[where] = rows


def available_bytes() -> int | None:
    """Main memory that this process could still use: what the machine has free, or its control group; None: unknown."""
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        try:
            import psutil
        except ImportError:
            return None
        return int(psutil.virtual_memory().available)
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    if found is None:
        return None
    return int(min(int(found[1]) * 1024, _available_in_group("/sys/fs/cgroup")))


def _available_in_group(directory: str) -> float:
    """What the control group of a container leaves, infinite without a limit; cached files do not count as used."""
    try:
        limit = Path(directory, "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return float("inf")
        used = int(Path(directory, "memory.current").read_text(encoding="ascii"))
        cached = re.search(r"^inactive_file (\d+)", Path(directory, "memory.stat").read_text(encoding="ascii"), re.M)
    except (OSError, ValueError):
        return float("inf")
    return max(0, int(limit) - used + (int(cached[1]) if cached else 0))


def _nameless_file(directory: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=directory)
    except OSError as error:
        raise _no_room(error, directory) from error


def _no_room(error: OSError, directory: str) -> OSError:
    return OSError(
        error.errno,
        f"Predictions do not fit into main memory (eval_memory_budget_gib), and {directory} takes no more of them: "
        f"{error.strerror}. Free some space, keep less with preprocess_logits_for_metrics, or let compute_metrics be a "
        "streaming metric, which keeps none.",
    )
