"""Samplers that can begin anywhere in an epoch, and what they share.

Owns: `Resumable`, the seeded random order that a run uses by default and the sequential one. Leaves to others: which
order (samplers), orders by length (length_grouping, rebalance).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler

from trainwright.data.permutation import LargeOrder

LARGE = 2**24  # samples; torch.randperm of as many takes 128 MiB and about a second
CHUNK = 4096  # indices turned into Python ints at a time: a list of all of them costs five times the tensor's memory


def seeded(seed: int) -> torch.Generator:
    """A CPU generator that starts from `seed` (wrapped into 63 bits, as unseeded processes report 64-bit seeds)."""
    return torch.Generator().manual_seed(seed if -(2**63) <= seed < 2**63 else seed % 2**63)


class Resumable:
    """A sampler that can begin anywhere: the next iteration, and only that, starts with sample `start`."""

    start: int = 0

    def take_start(self) -> int:
        """Where this iteration begins; the next one begins at 0 again."""
        start, self.start = self.start, 0
        return start


def iterate_from(order: torch.Tensor, start: int) -> Iterator[int]:
    """The indices in `order` (int64 `(num_samples,)`) from place `start` on, as Python ints."""
    chunks = (order[begin : begin + CHUNK].tolist() for begin in range(start, len(order), CHUNK))
    return itertools.chain.from_iterable(chunks)  # not `yield from`: that would cost a Python call per sample


class SeededRandomSampler(Resumable, Sampler[int]):
    """A random order that depends on nothing but `seed + epoch`: `torch.randperm` of a generator seeded with it.

    `data_source` is a data set or its length. `start`: the next iteration begins with this sample of the epoch, at no
    cost; it applies once. Memory: 8 bytes per sample, up to `LARGE` samples; beyond, a few kilobytes for any number.
    """

    def __init__(self, data_source: Any, seed: int, epoch: int = 0) -> None:
        self.num_samples = data_source if isinstance(data_source, int) else len(data_source)
        self.seed = seed
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        start = self.take_start()
        if self.num_samples > LARGE:
            return LargeOrder(self.num_samples, self.seed + self.epoch).iterate(start)
        return iterate_from(torch.randperm(self.num_samples, generator=seeded(self.seed + self.epoch)), start)


class ResumableSequentialSampler(Resumable, SequentialSampler):
    """torch's `SequentialSampler` that can begin anywhere."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.take_start(), len(self.data_source)))
