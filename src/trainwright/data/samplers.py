"""Which sampler a run uses.

Owns: the choice by strategy, and the list of all samplers by their documented names. Leaves to others: the samplers
(resumable_sampler, length_grouping, distributed_samplers, rebalance).
Source: seed 001 (`group_by_length`), `api.json` of 5.23 (`train_sampling_strategy`).
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import Sampler, SequentialSampler

from trainwright.data.distributed_samplers import (
    DistributedSamplerWithLoop,
    IterableDatasetShard,
    SequentialDistributedSampler,
    ShardSampler,
    get_dataloader_sampler,
    get_tpu_sampler,
)
from trainwright.data.length_grouping import (
    DistributedLengthGroupedSampler,
    LengthGroupedSampler,
    LengthSortedSampler,
    get_length_grouped_indices,
)
from trainwright.data.lengths import sample_lengths
from trainwright.data.rebalance import BatchRebalanceSampler
from trainwright.data.resumable_sampler import ResumableSequentialSampler, SeededRandomSampler
from trainwright.names import closest

__all__ = [
    "BatchRebalanceSampler",
    "DistributedLengthGroupedSampler",
    "DistributedSamplerWithLoop",
    "IterableDatasetShard",
    "LengthGroupedSampler",
    "LengthSortedSampler",
    "SeededRandomSampler",
    "SequentialDistributedSampler",
    "ShardSampler",
    "build_eval_sampler",
    "build_train_sampler",
    "get_dataloader_sampler",
    "get_length_grouped_indices",
    "get_tpu_sampler",
    "has_length",
    "sample_lengths",
]

STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")


def _check_strategy(argument: str, strategy: str, allowed: tuple[str, ...]) -> None:
    if strategy not in allowed:
        raise ValueError(
            f"{argument}={strategy!r} is not a sampling strategy; choose one of {list(allowed)}."
            f"{closest(str(strategy), allowed)}"
        )


def has_length(dataset: Any) -> bool:
    """Whether `len` of a data set or loader works. Streams have none, or none that is known before they are read."""
    try:
        len(dataset)
    except (TypeError, NotImplementedError):
        return False
    return True


def build_train_sampler(
    dataset: Any,
    *,
    strategy: str = "random",
    seed: int,
    batch_size_for_grouping: int = 1,
    length_column_name: str | None = None,
    model_input_name: str | None = None,
    world_size: int = 1,
    rank: int = 0,
    gradient_accumulation_steps: int = 1,
    drop_last: bool = False,
    num_workers: int = 0,
) -> Sampler[Any] | None:
    """The order in which a run sees its training data; None for data without a length, which have an order already.

    `strategy`: "random", "sequential", "group_by_length", or "batch_rebalance" (a batch sampler: it yields lists).
    `batch_size_for_grouping` is the number of samples of one update over all processes. `num_workers` processes count
    lengths, where no column holds them. All orders have `set_epoch` and
    `start` where the order can depend on them, and are the same on every process (batch_rebalance: this `rank`'s part).
    """
    _check_strategy("train_sampling_strategy", strategy, STRATEGIES)
    if dataset is None or not has_length(dataset):
        return None
    if strategy == "random":
        return SeededRandomSampler(dataset, seed)
    if strategy == "sequential":
        return ResumableSequentialSampler(dataset)
    lengths = sample_lengths(
        dataset, length_column_name=length_column_name, model_input_name=model_input_name, num_workers=num_workers
    )
    if strategy == "group_by_length":
        return LengthGroupedSampler(batch_size_for_grouping, lengths=lengths, seed=seed)
    return BatchRebalanceSampler(
        lengths,
        effective_batch_size=batch_size_for_grouping,
        dp_size=world_size,
        grad_accum=gradient_accumulation_steps,
        seed=seed,
        rank=rank,
        drop_last=drop_last,
    )


def build_eval_sampler(
    dataset: Any,
    *,
    strategy: str = "sequential",
    batch_size: int = 1,
    length_column_name: str | None = None,
    model_input_name: str | None = None,
    seed: int = 0,
    num_workers: int = 0,
) -> Sampler[int] | None:
    """The order in which evaluation sees its data; None for data without a length.

    Grouped or sorted by length ("group_by_length", "length_sorted"), else as the data lie. Samplers that change the
    order have an `order`, the sample at each place.
    """
    _check_strategy("strategy", strategy, (*STRATEGIES, "length_sorted"))
    if dataset is None or not has_length(dataset):
        return None
    if strategy in ("group_by_length", "length_sorted"):
        lengths = sample_lengths(
            dataset, length_column_name=length_column_name, model_input_name=model_input_name, num_workers=num_workers
        )
        if strategy == "length_sorted":
            return LengthSortedSampler(lengths)
        return LengthGroupedSampler(batch_size, lengths=lengths, seed=seed)
    return SequentialSampler(dataset)
