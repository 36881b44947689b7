"""Orders that put samples of similar length into one batch, so that little of it is padding.

Owns: length-grouped samplers. Leaves to others: lengths of samples (lengths), when to use the orders (samplers).
Source: seed 001 (`group_by_length`, `length_column_name`); orders equal those of both installed releases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler, Sampler

from trainwright.data.lengths import sample_lengths
from trainwright.data.resumable_sampler import Resumable, iterate_from, seeded

MAX_BATCHES_PER_GROUP = 50


def get_length_grouped_indices(
    lengths: Any, batch_size: int, mega_batch_mult: int | None = None, generator: torch.Generator | None = None
) -> list[int]:
    """A random order in which each run of `batch_size * mega_batch_mult` samples is sorted by falling length.

    The longest sample of all comes first, so that a batch too large for the device fails at once. `mega_batch_mult`
    defaults to a quarter of the batches, 1 to 50.
    """
    return _grouped_order(torch.as_tensor(lengths), batch_size, mega_batch_mult, generator).tolist()


def _grouped_order(
    lengths: torch.Tensor, batch_size: int, mega_batch_mult: int | None, generator: torch.Generator | None
) -> torch.Tensor:
    """`get_length_grouped_indices` as an int64 tensor `(num_samples,)`."""
    num_samples = len(lengths)
    if mega_batch_mult is None:
        mega_batch_mult = max(1, min(num_samples // (batch_size * 4), MAX_BATCHES_PER_GROUP))
    order = torch.randperm(num_samples, generator=generator)  # (num_samples,)
    groups = [
        group[lengths[group].argsort(descending=True, stable=True)]
        for group in torch.split(order, mega_batch_mult * batch_size)
    ]
    leaders = torch.stack([group[0] for group in groups])  # (num_groups,)
    longest = int(lengths[leaders].argmax())
    swapped = groups[0][0].clone()
    groups[0][0], groups[longest][0] = leaders[longest], swapped
    return torch.cat(groups)


def _given_lengths(dataset: Any, lengths: Any, model_input_name: str | None) -> torch.Tensor:
    if lengths is not None:
        return torch.as_tensor(lengths, dtype=torch.int64)
    if dataset is None:
        raise ValueError("Grouping by length needs either dataset or lengths; both are None.")
    return sample_lengths(dataset, model_input_name=model_input_name)


class LengthGroupedSampler(Resumable, Sampler[int]):
    """Samples in a random order grouped by length.

    After `set_epoch(e)` the order depends on nothing but the seed and `e`: `seed`, or what `generator` (or torch) was
    seeded with. Until then each iteration draws a new order from `generator` (or torch's global one). `start`: the next
    iteration begins with this sample; it applies once.
    """

    def __init__(
        self,
        batch_size: int,
        dataset: Dataset[Any] | None = None,
        lengths: Sequence[int] | torch.Tensor | None = None,
        model_input_name: str | None = None,
        generator: torch.Generator | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.lengths = _given_lengths(dataset, lengths, model_input_name)
        self.generator = generator
        self.seed = seed
        self.epoch: int | None = None if seed is None else 0
        self._order: torch.Tensor | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator, start = self.generator, self.take_start()
        if self.epoch is not None:
            base = torch.initial_seed() if generator is None else generator.initial_seed()
            generator = seeded((base if self.seed is None else self.seed) + self.epoch)
        self._order = _grouped_order(self.lengths, self.batch_size, None, generator)
        return iterate_from(self._order, start)

    @property
    def order(self) -> torch.Tensor:
        """The sample at each place of the current iteration, int64 (num_samples,)."""
        if self._order is None:  # this process leaves the reading to another
            iter(self)
        assert self._order is not None
        return self._order


class LengthSortedSampler(Sampler[int]):
    """Samples by falling length, equal ones in the order of the data set: the least padding there can be.

    The longest come first, so that a batch too large for the device fails at once. `lengths`: (num_samples,).
    """

    def __init__(self, lengths: Sequence[int] | torch.Tensor) -> None:
        self.order = torch.as_tensor(lengths).argsort(descending=True, stable=True)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iterate_from(self.order, 0)


class DistributedLengthGroupedSampler(DistributedSampler[Any]):
    """One process's share of a random order grouped by length: every `num_replicas`-th sample from `rank` on.

    Equal on all processes by `seed + epoch`. `drop_last` cuts the tail that does not fill every process, else the head
    is repeated.
    """

    def __init__(
        self,
        batch_size: int,
        dataset: Dataset[Any] | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
        lengths: Sequence[int] | torch.Tensor | None = None,
        model_input_name: str | None = None,
    ) -> None:
        self.lengths = _given_lengths(dataset, lengths, model_input_name)
        super().__init__(self.lengths, num_replicas, rank, shuffle=True, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        order = _grouped_order(self.lengths, self.batch_size, None, seeded(self.seed + self.epoch))
        repeats = -(-self.total_size // max(1, len(order)))
        order = order.repeat(max(1, repeats))[: self.total_size]
        return iterate_from(order[self.rank :: self.num_replicas], 0)
