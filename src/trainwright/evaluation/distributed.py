"""Nested tensors across processes, through `torch.distributed`.

Owns: gathering, one process going first, and which process this is. Leaves to others: starting the process group and
the gathering that knows about repeated samples (the strategy's). Names: `trainer_pt_utils`, `trainer_utils`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from trainwright import nested
from trainwright.interop.optional import is_installed, require
from trainwright.names import IGNORE_INDEX, ParallelMode
from trainwright.nested import Nested, atleast_1d, expand_like, nested_new_like, nested_truncate, rebuild

logger = logging.getLogger(__name__)


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _require_process_group(function: str) -> None:
    if not _is_initialized():
        raise RuntimeError(
            f"{function} gathers from all processes, but no process group exists. "
            "Start the script with torchrun or accelerate launch, or call torch.distributed.init_process_group first."
        )


def distributed_concat(tensor: Nested, num_total_examples: int | None = None) -> Nested:
    """The rows of every process in rank order, leaf by leaf; every process must hold equally many.

    num_total_examples: keep this many rows, without those a sampler added to make shares equal.
    """
    _require_process_group("distributed_concat")

    def gather(leaf: Any) -> torch.Tensor:
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"distributed_concat gathers tensors, not {type(leaf).__name__}.")
        leaf = atleast_1d(leaf).contiguous()  # (rows, ...)
        gathered = [torch.empty_like(leaf) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, leaf)
        return torch.cat(gathered)[:num_total_examples]

    return nested.map(gather, tensor)


def distributed_broadcast_scalars(
    scalars: list[int | float], num_total_examples: int | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """The numbers of every process as one tensor, in rank order. `device` must suit the backend; None picks one."""
    _require_process_group("distributed_broadcast_scalars")
    if device is None:
        device = "cpu" if "cpu" in str(dist.get_backend_config()) else torch.accelerator.current_accelerator()
    gathered: torch.Tensor = distributed_concat(torch.tensor(scalars, device=device), num_total_examples)
    return gathered


def nested_xla_mesh_reduce(tensors: Nested, name: str) -> Nested:
    """The rows of every TPU core, leaf by leaf; `name` identifies the exchange and must agree on all cores."""
    xla_model = require("torch_xla.core.xla_model", "nested_xla_mesh_reduce")
    leaves = iter(range(2**31))  # each leaf is an exchange, numbered in the same order on every core
    return nested.map(
        lambda leaf: xla_model.mesh_reduce(f"{name}_{next(leaves)}", atleast_1d(leaf), torch.cat), tensors
    )


def nested_gather(tensors: Nested, parallel_mode: ParallelMode, name: str | None = None) -> Nested:
    """The rows of every process; `tensors` itself where there is one process. `name` identifies an exchange on TPUs."""
    if tensors is None:
        return None
    if parallel_mode == ParallelMode.TPU and is_installed("torch_xla"):
        return nested_xla_mesh_reduce(tensors, name or "nested_gather")
    return distributed_concat(tensors) if _is_initialized() else tensors


@contextmanager
def torch_distributed_zero_first(local_rank: int) -> Iterator[None]:
    """The body runs on local rank 0 while the others wait, then on them; local_rank -1 means a single process."""
    waits = local_rank != -1 and _is_initialized()
    if waits and local_rank != 0:
        dist.barrier()
    yield
    if waits and local_rank == 0:
        dist.barrier()


def is_main_process(local_rank: int) -> bool:
    """Whether this is rank 0 of all processes; without a process group, whether `local_rank` says so (0 or -1)."""
    return dist.get_rank() == 0 if _is_initialized() else local_rank in (-1, 0)


def total_processes_number(local_rank: int) -> int:
    """The number of processes; 1 without a process group. `local_rank` is there for callers of the documented name."""
    return dist.get_world_size() if _is_initialized() else 1


class DistributedTensorGatherer:
    """Puts rows gathered batch by batch back into dataset order.

    For a sampler that gives every process one contiguous share of the dataset: the rows of process p start at
    p * process_length. `make_multiple_of` is the batch size where shares are whole batches.
    """

    def __init__(
        self, world_size: int, num_samples: int, make_multiple_of: int | None = None, padding_index: int = IGNORE_INDEX
    ) -> None:
        self.world_size = world_size
        self.num_samples = num_samples
        share = world_size * (make_multiple_of or 1)
        self.total_samples = math.ceil(num_samples / share) * share
        self.process_length = self.total_samples // world_size
        self.padding_index = padding_index
        self._storage: Nested = None
        self._offset = 0  # rows of each share that are filled

    def add_arrays(self, arrays: Nested) -> None:
        """Store one batch of all processes: arrays of world_size * batch rows, process after process."""
        if arrays is None:
            return
        if self._storage is None:
            self._storage = nested_new_like(arrays, self.total_samples, self.padding_index)
        num_rows: list[int] = []
        self._storage = self._store(self._storage, arrays, num_rows)
        self._offset += num_rows[0]

    def _store(self, storage: Nested, arrays: Nested, num_rows: list[int]) -> Nested:
        if isinstance(arrays, (list, tuple)):
            return rebuild(arrays, [self._store(stored, new, num_rows) for stored, new in zip(storage, arrays)])
        if len(arrays) % self.world_size:
            raise ValueError(
                f"arrays must have a multiple of {self.world_size} rows (world_size), found {len(arrays)}."
            )
        if arrays.ndim > 1 and arrays.shape[1] > storage.shape[1]:
            storage = expand_like(storage, arrays.shape[1], self.padding_index)
        rows = len(arrays) // self.world_size
        num_rows.append(rows)
        for process in range(self.world_size):
            start = process * self.process_length + self._offset
            new = arrays[process * rows : (process + 1) * rows]
            target = storage[start : start + rows]
            (target[:, : arrays.shape[1]] if arrays.ndim > 1 else target)[...] = new
        return storage

    def finalize(self) -> Nested:
        """All rows in dataset order, without the repeated ones at the end; None where nothing was added."""
        if self._storage is None:
            return None
        if self._offset != self.process_length:
            logger.warning("%d of %d samples per process were added.", self._offset, self.process_length)
        return nested_truncate(self._storage, self.num_samples)
