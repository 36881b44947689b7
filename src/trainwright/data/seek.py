"""Going to a position in the data without reading what comes before it.

Owns: `seek`, skipping batches, the workers' shares of a stream. Leaves to others: the orders themselves (samplers),
the position of a run (`data_position`), saving it (checkpoint). A position is counted in samples over all processes,
so that it means the same after the batch size, the accumulation, the number of workers or of processes changed.

How to resume: set the generators to their state at the start of the epoch, then
`loader, leftover = seek(loader, samples_in_epoch, batch_size)`, `set_epoch(loader, epoch)`,
`iterator = iter(loader)`, `discard_batches(iterator, leftover)`, and set the generators to their saved state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainwright.data.proxy import Proxy
from trainwright.data.resumable_sampler import Resumable, seeded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerShares:
    """How much of its share of a stream each loader worker has given in this epoch, in one process.

    The workers give batches in turn. `before`: samples of each that were passed over when the batch size changed;
    `num_batches`: given since.
    """

    batch_size: int
    before: tuple[int, ...]
    num_batches: int = 0

    @classmethod
    def restored(cls, saved: Any, dataloader: Any, num_processes: int, *, is_start: bool) -> WorkerShares | None:
        """From what a checkpoint holds (`saved`), for `dataloader`; None where workers share no stream, or nothing is
        known. `is_start`: an epoch begins. Warns where samples will be skipped and others seen again.
        """
        num_workers = getattr(dataloader, "num_workers", 0)
        size = getattr(dataloader, "batch_size", None)
        if not num_workers or not size or not isinstance(getattr(dataloader, "dataset", None), IterableDataset):
            return None
        if is_start:
            return cls(size, (0,) * num_workers)
        if not isinstance(saved, Mapping):
            return None
        shares = cls(saved["batch_size"], tuple(saved["before"]), saved["num_batches"])
        if len(shares.before) == num_workers and shares.batch_size == size:
            return shares
        if len(shares.before) == num_workers and num_processes == 1:
            return cls(size, shares.given())
        what = "number of workers" if len(shares.before) != num_workers else "batch size, with several processes,"
        logger.warning(
            "The %s changed, and with it the share of the stream that each worker reads: what was seen of which share "
            "means nothing now, so in this epoch some samples are seen again and others not at all. Keep it until the "
            "epoch's end, or use dataloader_num_workers=0.",
            what,
        )
        return None

    def after(self, num_batches: int) -> WorkerShares:
        """When so many more batches were given."""
        return replace(self, num_batches=self.num_batches + num_batches)

    def given(self) -> tuple[int, ...]:
        """Samples of each worker. Exact until the first of them has no more."""
        rounds, rest = divmod(self.num_batches, len(self.before))
        return tuple(n + self.batch_size * (rounds + (worker < rest)) for worker, n in enumerate(self.before))

    def to_dict(self) -> dict[str, Any]:
        """As JSON; the inverse is `restored`."""
        return {"batch_size": self.batch_size, "before": list(self.before), "num_batches": self.num_batches}


class SkippingBatchSampler(Proxy):
    """A batch sampler whose next iteration (only that) leaves out `num_batches` batches and `num_samples` samples."""

    _inside = "batch_sampler"

    def __init__(self, batch_sampler: Any, num_batches: int, num_samples: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.num_batches = num_batches
        self.num_samples = num_samples

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        return SkippingIterator(self)


class SkippingIterator:
    """An iteration of a `SkippingBatchSampler`. Skips when first used: a loader with workers makes two and uses one."""

    def __init__(self, owner: SkippingBatchSampler) -> None:
        self.owner = owner
        self.batches: Iterator[Any] = iter(owner.batch_sampler)
        self.has_begun = False

    def begin(self) -> None:
        """Pass over what is to be skipped, if that has not happened yet."""
        if self.has_begun:
            return
        self.has_begun = True
        owner = self.owner
        num_batches, num_samples, owner.num_batches, owner.num_samples = owner.num_batches, owner.num_samples, 0, 0
        for _ in range(num_batches):
            next(self.batches, None)
        while num_samples > 0 and (batch := next(self.batches, None)) is not None:
            if len(batch) > num_samples:
                self.batches = chain([batch[num_samples:]], self.batches)
            num_samples -= len(batch)

    def __iter__(self) -> SkippingIterator:
        return self

    def __next__(self) -> Any:
        self.begin()
        return next(self.batches)


class SkippingStream(Proxy, IterableDataset[Any]):
    """A stream whose next iteration reads and drops `num_samples` samples, with a progress bar. Applies once.

    Where workers share a stream, `num_samples` has a number for each of them.
    """

    _inside = "dataset"

    def __init__(self, dataset: Any, num_samples: int | Sequence[int]) -> None:
        self.dataset = dataset
        self.num_samples = num_samples

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        samples: Iterator[Any] = iter(self.dataset)
        num_samples, self.num_samples = self.num_samples, 0
        if not isinstance(num_samples, int):
            worker = get_worker_info()
            num_samples = num_samples[0 if worker is None else worker.id]
        _discard(samples, num_samples, "sample")
        return samples


class BegunLoader(Proxy):
    """An accelerate loader, whose iterator has drawn from torch's generator when it is made, as torch's own has.

    accelerate's is a Python generator: nothing happens before its first batch is asked for, which would be after the
    random states of a checkpoint were restored.
    """

    _inside = "dataloader"

    def __init__(self, dataloader: Any) -> None:
        self.dataloader = dataloader

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.dataloader)
        first = list(islice(batches, 1))
        return chain(first, batches)


def _discard(iterator: Iterator[Any], number: int, unit: str) -> None:
    if number <= 0:
        return
    from tqdm.auto import tqdm

    # The bar appears after a second: short skips need none.
    for _ in tqdm(range(number), desc="Going to where training stopped", unit=unit, delay=1.0, leave=False):
        if next(iterator, None) is None:
            return


def discard_batches(iterator: Iterator[Any], num_batches: int) -> None:
    """Fetch and drop `num_batches` batches of a loader's iterator, with a progress bar; stops early where the data end.

    Call it with 0 too: what `seek` passes over is then passed over here and not when the first batch is asked for, so
    that samplers that draw from torch's global generator do so before the generators get their saved state.
    """
    order = getattr(iterator, "_sampler_iter", None)  # of torch's loader iterators
    if isinstance(order, SkippingIterator):
        order.begin()
    _discard(iterator, num_batches, "batch")


def _with(dataloader: Any, **replaced: Any) -> Any:
    """A shallow copy of a torch or accelerate loader with other parts; the loader itself stays as it is."""
    clone = object.__new__(type(dataloader))
    clone.__dict__.update(dataloader.__dict__)
    base = clone.__dict__.get("base_dataloader")  # accelerate keeps the torch loader inside
    if base is not None:
        clone.__dict__["base_dataloader"] = _with(base, **replaced)
    else:
        # Past DataLoader.__setattr__, which refuses to change what it has checked: the kind of both parts stays.
        clone.__dict__.update(replaced, _iterator=None)
    return clone


def _is_torch_loader(dataloader: Any) -> bool:
    return isinstance(dataloader, DataLoader) or hasattr(dataloader, "base_dataloader")


def _seekable(dataloader: Any) -> Any:
    """The innermost sampler if it can begin anywhere, else None."""
    part = getattr(dataloader, "batch_sampler", None) or getattr(dataloader, "sampler", None)
    while part is not None:
        if isinstance(part, Resumable):
            return part
        part = getattr(part, "batch_sampler", None) or getattr(part, "sampler", None)
    return None


def seek(dataloader: Any, num_samples: int, batch_size: int, shares: WorkerShares | None = None) -> tuple[Any, int]:
    """A loader whose next iteration starts after `num_samples` samples, and how many batches are left to drop by hand.

    `num_samples` counts all processes; `batch_size` is what they take together per batch. Only the next iteration is
    short: from then on the loader returned gives whole epochs.

    - Our samplers, however wrapped: `start` is set, nothing is fetched, exact for any batch size.
    - Other samplers over indexed data, and ours at a whole batch of several processes: batches are passed over as
      indices, nothing is fetched; a batch that was half seen is cut.
    - Streams without workers: samples are read and dropped, not collated.
    - Streams with workers, as far as `shares` knows how much each has given: whole batches are left for
      `discard_batches`, so that the workers' random numbers are drawn again; what was given in batches of another size
      is passed over before that, in each worker as many samples as it gave.
    - Without `shares`, and other iterables: whole batches are left for `discard_batches`. Where `num_samples` is no
      multiple of `batch_size` the rest is seen again, and a warning says so.
    """
    if num_samples <= 0:
        return dataloader, 0
    dataset = getattr(dataloader, "dataset", None)
    is_stream = isinstance(dataset, IterableDataset)
    # accelerate's dispatcher reads for all processes in one of them, so a share cannot be counted here.
    is_dispatched = type(dataloader).__name__ == "DataLoaderDispatcher"
    num_batches, rest = divmod(num_samples, batch_size)
    if _is_torch_loader(dataloader) and not is_stream:
        sampler = _seekable(dataloader)
        num_shares = 1 if is_dispatched else _num_shares(dataloader, batch_size)
        # accelerate fills up the last round from the first batches that it is given, which must be those of the epoch.
        if sampler is not None and (rest or num_shares == 1):
            sampler.start = num_samples
            return _begun(dataloader), 0
        batch_sampler = dataloader.batch_sampler
        if batch_sampler is not None:
            rest //= num_shares
            skipping = _with(dataloader, batch_sampler=SkippingBatchSampler(batch_sampler, num_batches, rest))
            return _begun(skipping), 0
    if is_stream and isinstance(dataloader, DataLoader) and dataloader.num_workers == 0 and not is_dispatched:
        samples_here = num_samples // _num_shares(dataloader, batch_size)
        return _begun(_with(dataloader, dataset=SkippingStream(dataset, samples_here))), 0
    if shares is not None:
        if not any(shares.before):
            return dataloader, shares.num_batches
        return _with(dataloader, dataset=SkippingStream(dataset, shares.before)), shares.num_batches
    if rest:
        logger.warning(
            "Training stopped %d samples into a batch of %d, and this data set can only be continued at whole batches, "
            "because what it gave cannot be told from the number of samples: these will be seen again. A data set with "
            "a length, or dataloader_num_workers=0, avoids that.",
            rest,
            batch_size,
        )
    return dataloader, num_batches


def _begun(dataloader: Any) -> Any:
    is_wrapper = getattr(dataloader, "base_dataloader", dataloader) is not dataloader
    return BegunLoader(dataloader) if is_wrapper else dataloader


def _num_shares(dataloader: Any, batch_size: int) -> int:
    """How many processes share a batch of `batch_size`, by the batch size of this process's loader."""
    batch_size_here = getattr(dataloader, "batch_size", None) or getattr(dataloader.batch_sampler, "batch_size", None)
    return max(1, batch_size // int(batch_size_here or batch_size))


def draw_no_seed_for_workers_that_stay(dataloader: Any, epoch: int) -> None:
    """Have a loader with persistent workers seed those that it may have to start now without drawing from torch's
    global generator. The run before the interruption did not draw here: its workers were there since its first epoch.
    """
    inner = getattr(dataloader, "base_dataloader", None)
    loader = dataloader if inner is None else inner  # not `or`: the truth of a loader is its length
    if getattr(loader, "persistent_workers", False) and getattr(loader, "generator", ...) is None:
        loader.generator = seeded(torch.initial_seed() + epoch)


def with_one_worker(dataloader: Any) -> Any:
    """The same loader with one worker that makes one batch at a time. The parts of both are shared."""
    inner = getattr(dataloader, "dataset", None)
    if isinstance(inner, IterableDataset):
        return dataloader  # workers share a stream out among them, so their number decides its order
    return _with(dataloader, num_workers=1, prefetch_factor=1, persistent_workers=False)


def describe(dataloader: Any, first: int, num_samples: int, epoch: int) -> str:
    """Words for the batch that begins at place `first` of an epoch: its places, and the samples where an order names
    them. Reads the order, not the data.
    """
    place = f"samples {first} to {first + num_samples - 1} of epoch {epoch}"
    sampler = None if isinstance(getattr(dataloader, "dataset", None), IterableDataset) else _seekable(dataloader)
    if sampler is None:
        return place
    start_before, sampler.start = sampler.start, first
    indices = [index for index, _ in zip(iter(sampler), range(num_samples))]
    sampler.start = start_before
    return f"{place}, which have the indices {indices}"
