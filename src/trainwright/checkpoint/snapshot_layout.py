"""Where the tensors of one file of a snapshot are in shared memory, and how they get there.

Owns: telling whether the tensors are those of the save before, in the same places, so that nothing needs to be worked
out again; the copy within the host. Leaves to others: the memory (shared_memory.py), everything of a file that is no
tensor (snapshot.py).
"""

from __future__ import annotations

import ctypes
import os
import pickle
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch

from trainwright.checkpoint.shared_memory import Arena, Place, aligned

Description = tuple[Any, ...]  # of a tensor and its storage: see `described_as`
StorageKey = tuple[torch.device, int, int]  # device, address and size: two that NumPy lent may begin at one address
Copy = tuple[int, int, int]  # to which address, from which, how many bytes

_PIECE = 1 << 20  # bytes that are copied in one call
_WORTH_THREADS = 4  # pieces, from which several cores copy: starting a thread takes as long as copying half of one
_MOST_THREADS = 4  # more gain little: the memory is the limit


class NotPlain(Exception):
    """Something that cannot be put together again in another process."""


@dataclass
class SnapshotLayout:
    """Places for the tensors of a file. Holds numbers only, so it keeps no tensor alive."""

    described: list[Description]  # of each tensor
    whole: Place  # reserved for all
    places: dict[StorageKey, Place]  # of the copy of each storage
    table: bytes  # pickled: a Place for each storage, and (storage, dtype, offset, shape, stride) of each tensor
    copies: list[Copy]  # within the host
    is_on_device: bool  # whether there are others
    num_bytes: int


def copy_within_host(copies: list[Copy], num_processes: int = 1) -> None:
    """Make all of `copies`; returns when they are made. `num_processes`: that share the cores, and copy now.

    By several threads, because one core does not move as much as the memory could give, and the run waits. They are
    gone afterwards: a process with threads is one that others do not like to fork.
    """
    left = deque(copies)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_threads = min(cores // num_processes, _MOST_THREADS) if len(copies) >= _WORTH_THREADS else 1
    helpers: list[Thread] = []
    try:
        with suppress(RuntimeError):  # no more threads: those there are do it all
            for _ in range(num_threads - 1):
                helper = Thread(target=_copy, args=(left,))
                helper.start()
                helpers.append(helper)
        _copy(left)
    finally:
        left.clear()  # after an interrupt no helper may copy any more
        for helper in helpers:
            helper.join()


def _copy(left: deque[Copy]) -> None:
    while left:
        with suppress(IndexError):  # another thread took the last
            ctypes.memmove(*left.popleft())  # releases the interpreter lock; a quarter faster than torch's own copy


def described_as(tensor: torch.Tensor) -> Description:
    """What a tensor is, and where its bytes are: dtype, offset, shape, stride; device, address and size of its storage.

    NotPlain where that is not all of it.
    """
    if (
        tensor.layout is not torch.strided
        or tensor.device.type not in ("cpu", "cuda")
        or tensor.requires_grad
        or tensor.is_quantized
        or tensor.is_nested
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.__dict__
    ):
        raise NotPlain(f"it holds a tensor on {tensor.device} that is not plain ({tensor.layout})")
    storage = tensor.untyped_storage()
    return (
        tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride(),
        tensor.device, storage.data_ptr(), storage.nbytes(),
    )  # fmt: skip


def layout_of(arena: Arena, described: list[Description], whole: Place | None = None) -> SnapshotLayout:
    """A place for each storage of a file; those of one device are contiguous. `whole`: reserved already."""
    storages: dict[Any, StorageKey] = {}
    keys: list[Any] = []
    for *_, device, address, num_bytes in described:
        storage = (device, address, num_bytes)
        keys.append(storage if num_bytes else len(keys))  # an empty one has no address, and nothing to share
        storages[keys[-1]] = storage
    ordered = dict(sorted(storages.items(), key=lambda item: str(item[1][0])))
    if whole is None:
        whole = arena.reserve(sum(aligned(num_bytes) for *_, num_bytes in ordered.values()))
    places: dict[Any, Place] = {}
    offset = whole.offset
    for key, (*_, num_bytes) in ordered.items():
        places[key] = Place(whole.block, offset, num_bytes)
        offset += aligned(num_bytes)
    numbers = {key: number for number, key in enumerate(ordered)}
    tensors = [
        (numbers[key], dtype, start, tuple(shape), stride)
        for key, (dtype, start, shape, stride, *_) in zip(keys, described)
    ]
    copies = [
        (
            arena.blocks[whole.block].address + places[key].offset + start,
            address + start,
            min(_PIECE, num_bytes - start),
        )
        for key, (device, address, num_bytes) in ordered.items()
        if device.type == "cpu"
        for start in range(0, num_bytes, _PIECE)
    ]
    return SnapshotLayout(
        described,
        whole,
        {key: place for key, place in places.items() if place.num_bytes},
        pickle.dumps((list(places.values()), tensors)),
        copies,
        any(device.type != "cpu" for device, *_ in ordered.values()),
        sum(num_bytes for *_, num_bytes in ordered.values()),
    )
