"""DataLoaders, and what can be asked of them.

Owns: `build_dataloader`, sizes of loaders, `RunLoader`. Leaves to others: the order (samplers), batches (collate), the
position of a run in the data (`data_position`), loaders that accelerate prepares.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from trainwright.data.batch_seeds import SeededBatchSampler, SeededPerBatch, SeededPerPass
from trainwright.data.rebalance import BatchRebalanceSampler
from trainwright.data.samplers import SeededRandomSampler, has_length
from trainwright.data.worker_transport import by_value

logger = logging.getLogger(__name__)

__all__ = ["RunLoader", "build_dataloader", "has_length", "num_examples", "num_tokens", "set_epoch", "with_answers"]


def _resumable(sampler: Any, seed: int | None) -> Any:
    """`sampler`, or in place of torch's `RandomSampler` without a generator one whose order follows from `seed`.

    torch's would draw its order from the global generator, so that it could not be had again on resume.
    """
    is_plain = type(sampler) is RandomSampler and sampler.generator is None and not sampler.replacement
    if seed is None or not is_plain or sampler.num_samples != len(sampler.data_source):
        return sampler
    return SeededRandomSampler(sampler.data_source, seed)


def _check_workers(num_workers: int, needing: dict[str, Any]) -> None:
    for name, value in needing.items():
        if value and num_workers == 0:
            raise ValueError(
                f"dataloader_{name}={value!r} is about worker processes, and dataloader_num_workers=0 starts none. Set "
                f"dataloader_num_workers to 1 or more, or leave dataloader_{name} at its default."
            )


def build_dataloader(
    dataset: Any,
    *,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    sampler: Any = None,
    drop_last: bool = False,
    num_workers: int = 0,
    pin_memory: bool = True,
    persistent_workers: bool = False,
    prefetch_factor: int | None = None,
    worker_init_fn: Callable[[int], None] | None = None,
    multiprocessing_context: Any = None,
    in_order: bool = True,
    timeout_s: float = 0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> DataLoader[Any]:
    """torch's `DataLoader`, with only the options that are legal for this data set.

    `batch_size` in samples. A `sampler` that yields lists (a batch sampler) decides the batches itself. Streams take no
    sampler and are never cut by `drop_last`. `pin_memory` acts only where an accelerator is present. `seed`: a
    `RandomSampler` without a generator gets an order that depends on it, and workers are seeded anew for each batch, so
    that random transforms are the same after a resume. Raises ValueError for worker options without
    workers.
    """
    _check_workers(
        num_workers,
        {
            "persistent_workers": persistent_workers,
            "prefetch_factor": prefetch_factor,
            "multiprocessing_context": multiprocessing_context,
        },
    )
    options: dict[str, Any] = {
        "collate_fn": collate_fn,
        "num_workers": num_workers,
        "pin_memory": pin_memory and torch.accelerator.is_available(),
        "persistent_workers": persistent_workers,
        "prefetch_factor": prefetch_factor,
        "worker_init_fn": by_value(worker_init_fn) if num_workers else None,
        "multiprocessing_context": multiprocessing_context,
        "in_order": in_order,
        "timeout": timeout_s if num_workers else 0,
        "generator": generator,
    }
    if isinstance(dataset, IterableDataset):
        if persistent_workers and seed is not None:
            dataset = SeededPerPass(dataset, seed, collate_fn)
        return DataLoader(dataset, batch_size=batch_size, **options)
    seeds_batches = seed is not None and num_workers > 0 and sampler is not None
    made_from = SeededPerBatch(dataset, collate_fn) if seeds_batches else dataset
    if isinstance(sampler, (BatchSampler, BatchRebalanceSampler)):
        loader = DataLoader(made_from, batch_sampler=sampler, **options)
    else:
        sampler = _resumable(sampler, seed)
        loader = DataLoader(made_from, batch_size=batch_size, sampler=sampler, drop_last=drop_last, **options)
    if seeds_batches:
        # Past DataLoader.__setattr__, so that the loader still names its batch size and drop_last.
        vars(loader)["batch_sampler"] = SeededBatchSampler(loader.batch_sampler, int(seed or 0))
    return loader


class RunLoader(DataLoader[Any]):
    """torch's loader, which answers what a script asks of one that an Accelerator prepared."""

    @property
    def total_batch_size(self) -> int:
        """Samples that all processes take at once."""
        if isinstance(self.batch_sampler, BatchRebalanceSampler):  # the mean: its micro-batches differ in size
            return self.batch_sampler.effective_batch_size // self.batch_sampler.grad_accum
        return int(self.batch_size or getattr(self.batch_sampler, "batch_size", None) or 1)

    @property
    def total_dataset_length(self) -> int:
        """Samples of all processes. TypeError where the data set has no length."""
        return len(self.dataset)  # type: ignore[arg-type]

    @property
    def base_dataloader(self) -> DataLoader[Any]:
        """torch's loader: this one."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`."""
        set_epoch(self, epoch)


def with_answers(dataloader: Any) -> Any:
    """`dataloader`, as a `RunLoader` where it is torch's own. The object stays the same."""
    if type(dataloader) is DataLoader:
        dataloader.__class__ = RunLoader
    return dataloader


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Tell everything in a loader that orders data which epoch comes next: the loader itself (accelerate's begins each
    pass by telling its samplers the epoch that it counts), batch samplers, samplers, the data set.
    """
    waiting = [dataloader, *(getattr(dataloader, name, None) for name in ("batch_sampler", "sampler", "dataset"))]
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        if hasattr(part, "set_epoch") and getattr(part, "base_dataloader", None) is not part:  # RunLoader asks us
            part.set_epoch(epoch)
        waiting += [getattr(part, name, None) for name in ("batch_sampler", "sampler")]


def num_examples(dataloader: Any, batch_size: int | None = None) -> int:
    """Samples in one pass over a loader: its data set's length, else its number of batches times the batch size.

    Raises TypeError where neither has a length.
    """
    dataset = getattr(dataloader, "dataset", None)
    if type(dataset).__name__ == "IterableDatasetShard":  # ours or accelerate's: its length is one process's share
        dataset = getattr(dataset, "dataset", None)
    if has_length(dataset):
        return len(dataset)  # type: ignore[arg-type]
    return len(dataloader) * (batch_size or getattr(dataloader, "batch_size", None) or 1)


def num_tokens(dataloader: Any, max_steps: int | None = None) -> int:
    """Tokens (elements of `input_ids`) in one pass; with `max_steps`, those of the first batch times `max_steps`.

    Reads the loader. 0, with a warning, where batches have no `input_ids`.
    """
    total = 0
    for batch in dataloader:
        try:
            num_in_batch: int = batch["input_ids"].numel()
        except (KeyError, TypeError, AttributeError):
            logger.warning("Tokens cannot be counted: batches have no tensor 'input_ids'. Counting 0.")
            return 0
        if max_steps is not None:
            return num_in_batch * max_steps
        total += num_in_batch
    return total
