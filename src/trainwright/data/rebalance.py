"""Micro-batches of unequal size and equal cost.

Owns: `BatchRebalanceSampler`. Leaves to others: lengths (length_grouping).
Source: `api.json` of 5.23. Observed there and done here: the samples of an update are those of random sampling, a
micro-batch holds samples of similar length, and micro-batches that run at the same time cost about the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from trainwright.data.resumable_sampler import Resumable, seeded

NUM_HALVINGS = 16  # comes within 1/65536 of the best split


class BatchRebalanceSampler(Resumable, Sampler[list[int]]):
    """Splits each update's `effective_batch_size` samples into `dp_size * grad_accum` micro-batches of like cost.

    A batch sampler: yields lists of indices, `grad_accum` per update and process. `n` samples padded to `m` tokens cost
    `n * m + QUADRATIC_COST_COEF * n * m**2` (linear layers, attention). An update's samples are sorted by length and
    cut where the costliest micro-batch is as cheap as can be; the `dp_size` longest run at the same time, cut to cost
    alike so that processes wait little for each other, then the next. All processes compute the same split from
    `seed + epoch`.

    `drop_last` drops an incomplete last update; else it is used, and filled up from the first samples only where there
    are fewer than micro-batches. `start`: the next iteration begins with this sample of the epoch; it applies once.
    Raises ValueError where `effective_batch_size` is smaller than the number of micro-batches.
    """

    QUADRATIC_COST_COEF = 0.001

    def __init__(
        self,
        lengths: Sequence[int] | torch.Tensor,
        effective_batch_size: int,
        dp_size: int,
        grad_accum: int,
        shuffle: bool = True,
        seed: int = 42,
        rank: int = 0,
        drop_last: bool = True,
    ) -> None:
        if effective_batch_size < dp_size * grad_accum:
            raise ValueError(
                f"effective_batch_size={effective_batch_size} samples cannot be split into dp_size * grad_accum = "
                f"{dp_size} * {grad_accum} micro-batches of at least one sample each."
            )
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64)
        self.effective_batch_size = effective_batch_size
        self.dp_size = dp_size
        self.grad_accum = grad_accum
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.effective_batch_size)
        return (full + (rest > 0 and not self.drop_last)) * self.grad_accum

    def __iter__(self) -> Iterator[list[int]]:
        start = self.take_start()
        num_samples, num_groups = len(self.lengths), self.dp_size * self.grad_accum
        generator = seeded(self.seed + self.epoch)
        order = torch.randperm(num_samples, generator=generator) if self.shuffle else torch.arange(num_samples)
        for begin in range(start, num_samples, self.effective_batch_size):
            update = order[begin : begin + self.effective_batch_size]  # (effective_batch_size,) or fewer
            if len(update) < self.effective_batch_size and self.drop_last:
                return
            if len(update) < num_groups:
                missing = num_groups - len(update)
                filling = order.repeat(-(-missing // num_samples))[:missing]
                update = torch.cat([update, filling])
            groups = self._split(update)
            for slot in range(self.grad_accum):
                yield groups[slot * self.dp_size + self.rank]

    def _split(self, update: torch.Tensor) -> list[list[int]]:
        """The samples of one update as lists of indices: `dp_size` that run first, `dp_size` that run next, ..."""
        lengths, places = self.lengths[update].sort(descending=True, stable=True)
        indices, costs = update[places].tolist(), [self._cost(1, length) for length in lengths.tolist()]
        groups: list[list[int]] = []
        begin, limit, num_groups = 0, costs[0] * len(costs), self.dp_size * self.grad_accum
        while len(groups) < num_groups:
            if len(groups) % self.dp_size == 0:  # what runs at the same time may all cost what the costliest does
                limit = self._lowest_limit(costs[begin:], num_groups - len(groups), limit)
            size = self._group_size(costs[begin], limit, len(costs) - begin, num_groups - len(groups))
            groups.append(indices[begin : begin + size])
            begin += size
        return groups

    def _lowest_limit(self, costs: list[float], num_groups: int, feasible: float) -> float:
        """About the lowest cost that `num_groups` groups can stay under; `feasible` is known to be enough."""
        low, high = costs[0], feasible
        if self._fits(costs, num_groups, low):
            return low
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2
            if self._fits(costs, num_groups, middle):
                high = middle
            else:
                low = middle
        return high

    def _fits(self, costs: list[float], num_groups: int, limit: float) -> bool:
        """Whether samples of falling `costs` fit into `num_groups` groups that each cost at most `limit`."""
        begin = 0
        for num_left in range(num_groups, 0, -1):
            begin += self._group_size(costs[begin], limit, len(costs) - begin, num_left)
            if begin == len(costs):
                return num_left == 1
        return False

    def _group_size(self, cost: float, limit: float, num_samples: int, num_groups: int) -> int:
        """How many of `num_samples` fit under `limit` when padded to a sample of `cost`; each later group gets one."""
        return max(1, min(int(limit / cost + 1e-9), num_samples - (num_groups - 1)))

    def _cost(self, num_samples: int, length: int) -> float:
        """Cost of a micro-batch of `num_samples` padded to `length` tokens, in token units."""
        length = max(1, length)
        return num_samples * length + self.QUADRATIC_COST_COEF * num_samples * length**2
