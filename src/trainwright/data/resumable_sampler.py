"""What samplers share: a generator from a seed, and reading an order out of a tensor.

Owns: `seeded`, `iterate_from`, `Resumable`. Leaves to others: which order (samplers, length_grouping, rebalance).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

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
