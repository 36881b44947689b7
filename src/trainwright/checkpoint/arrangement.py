"""Where the tensors of one file of a snapshot lie in shared memory, and how they get there.

Owns: telling whether the tensors are those of the save before, in the same places, so that nothing needs to be worked
out again; the copy within the host. Leaves to others: the memory (shared_memory.py), everything of a file that is no
tensor (snapshot.py).
"""

from __future__ import annotations

import ctypes
import pickle
from dataclasses import dataclass
from typing import Any

import torch

from trainwright.checkpoint.shared_memory import Arena, Place, aligned

Description = tuple[Any, ...]  # of a tensor and its storage: see `described_as`
StorageKey = tuple[torch.device, int]  # device and address

_WORTH_THREADS = 1 << 20  # bytes, from which a copy is divided among torch's threads, where there are several


class NotPlain(Exception):
    """Something that cannot be put together again in another process."""


@dataclass
class Arrangement:
    """Places for the tensors of a file. Holds numbers only, so it keeps no tensor alive."""

    described: list[Description]  # of each tensor
    whole: Place  # reserved for all
    places: dict[StorageKey, Place]  # of the copy of each storage
    table: bytes  # pickled: a Place for each storage, and (storage, dtype, offset, shape, stride) of each tensor
    copies: list[tuple[int, int, int]]  # within the host: to which address, from which, how many bytes
    is_on_device: bool  # whether there are others
    num_bytes: int

    def copy_in_host(self) -> None:
        """Copy the storages that lie in the memory of the host."""
        has_threads = torch.get_num_threads() > 1
        for target, source, num_bytes in self.copies:
            if has_threads and num_bytes >= _WORTH_THREADS:
                _bytes_at(target, num_bytes).copy_(_bytes_at(source, num_bytes))
            else:  # with one thread a quarter faster than torch's own copy
                ctypes.memmove(target, source, num_bytes)


def described_as(tensor: torch.Tensor) -> Description:
    """What a tensor is, and where its bytes are: dtype, offset, shape, stride; device, address and size of its storage.

    NotPlain where that is not all of it.
    """
    if (
        tensor.layout is not torch.strided
        or tensor.device.type not in ("cpu", "cuda")
        or tensor.requires_grad
        or tensor.is_quantized
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


def arranged(arena: Arena, described: list[Description], whole: Place | None = None) -> Arrangement:
    """A place for each storage of a file; those of one device lie one behind the other. `whole`: reserved already."""
    storages: dict[Any, tuple[torch.device, int, int]] = {}  # device, address, number of bytes
    keys: list[Any] = []
    for *_, device, address, num_bytes in described:
        keys.append((device, address) if num_bytes else len(keys))  # an empty one has no address, and nothing to share
        storages.setdefault(keys[-1], (device, address, num_bytes))
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
        (arena.blocks[whole.block].address + places[key].offset, address, num_bytes)
        for key, (device, address, num_bytes) in ordered.items()
        if device.type == "cpu" and num_bytes
    ]
    return Arrangement(
        described,
        whole,
        {key: place for key, place in places.items() if place.num_bytes},
        pickle.dumps((list(places.values()), tensors)),
        copies,
        any(device.type != "cpu" for device, *_ in ordered.values()),
        sum(num_bytes for *_, num_bytes in ordered.values()),
    )


def _bytes_at(address: int, num_bytes: int) -> torch.Tensor:
    """Memory of this process as a tensor; whoever owns it must outlive it."""
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=torch.uint8)
