"""A random order of any number of samples in constant memory, that can be entered anywhere at once.

Owns: `LargeOrder`. Leaves to others: when an order is large enough to need it (samplers).

How: a Feistel network permutes the integers below a power of four; results beyond the last sample are permuted again
until they fall below it ("cycle walking"), which keeps it a permutation. Place i of the order depends on i alone.
Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

_ROUNDS = 6  # four mix well enough for a cipher of this kind; two more cost little compared with reading a sample
_CHUNK = 4096  # places worked out at a time

Integers = np.ndarray[Any, np.dtype[np.uint64]]


class LargeOrder:
    """A permutation of `range(length)` that depends on `seed`."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self._half_bits = np.uint64(max(1, (max(length - 1, 1).bit_length() + 1) // 2))
        self._mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        self._keys = np.random.SeedSequence(seed % 2**64).generate_state(_ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.length

    def places(self, begin: int, end: int) -> Integers:
        """The samples at places `begin` to `end` of the order, (end - begin,)."""
        values = self._permuted(np.arange(begin, end, dtype=np.uint64))
        outside = values >= self.length
        while outside.any():  # at most three of four values lie outside, so this ends after a few rounds
            values[outside] = self._permuted(values[outside])
            outside = values >= self.length
        return values

    def iterate(self, start: int = 0) -> Iterator[int]:
        """The samples from place `start` on."""
        for begin in range(start, self.length, _CHUNK):
            yield from self.places(begin, min(begin + _CHUNK, self.length)).tolist()

    def _permuted(self, values: Integers) -> Integers:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right, key) & self._mask)
        permuted: Integers = (left << self._half_bits) | right
        return permuted


def _mixed(values: Integers, key: np.uint64) -> Integers:
    """Bits of `values` and `key` spread over all 64 (the finaliser of splitmix64); overflow is intended."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    spread: Integers = mixed ^ (mixed >> np.uint64(31))
    return spread
