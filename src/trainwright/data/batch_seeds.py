"""Random transforms in loader workers that are the same again after a resume, whatever the number of workers.

Owns: seeding a worker anew for each batch, from the seed, the epoch and the samples in it, and one that stays for each
pass over a stream. Leaves to others: the order of the samples (samplers), seeding workers once (workers). Without
workers nothing here is used: samples are then made in the training process, whose generators a checkpoint restores.

Why: torch seeds a worker once per epoch, and its randomness then depends on every batch it made before; after a resume
in the middle of an epoch those would all have to be made again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from trainwright.data import collator_rng
from trainwright.data.proxy import Proxy
from trainwright.seeding import set_seed


class SeededBatch(list[Any]):
    """The indices of one batch, and the seed for making it."""

    seed: int = 0


class SeededBatchSampler(Proxy):
    """A batch sampler whose batches carry a seed. All else is asked of the one inside."""

    _inside = "batch_sampler"

    def __init__(self, batch_sampler: Any, seed: int) -> None:
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        inner = getattr(self.batch_sampler, "set_epoch", None)
        if inner is not None:
            inner(epoch)

    def __iter__(self) -> Iterator[SeededBatch]:
        return map(self._seeded, iter(self.batch_sampler))

    def _seeded(self, indices: list[Any]) -> SeededBatch:
        batch = SeededBatch(indices)
        batch.seed = zlib.crc32(np.asarray([self.seed, self.epoch, *map(hash, indices)], dtype=np.int64).tobytes())
        return batch


class SeededPerBatch(Proxy, Dataset[Any]):
    """A data set that seeds all generators of its process, and those of the collator, before it makes a batch. For
    workers only.

    `collator`: the one that makes batches of the samples in the same worker. One that may make its generator at its
    first batch gets that batch twice, the first time only so that the generator is there to be seeded.
    """

    _inside = "dataset"

    def __init__(self, dataset: Any, collator: Any = None) -> None:
        self.dataset = dataset
        self._collator = collator
        self._tries_first = collator is not None and collator_rng.is_made_late(collator)
        self._fingerprint = collator_rng.fingerprint(collator) if self._tries_first else 0
        self._has_generators = self._tries_first

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Any) -> list[Any]:
        """The samples of a batch; the collator that runs next continues with the same generators."""
        if isinstance(indices, SeededBatch):
            if self._tries_first:
                self._tries_first = False
                self._collator(self._fetched(indices))
                self._has_generators = bool(collator_rng.find(self._collator))
            set_seed(indices.seed)
            if self._has_generators:
                collator_rng.reseed(self._collator, indices.seed ^ self._fingerprint)
        return self._fetched(indices)

    def _fetched(self, indices: Any) -> list[Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        return list(fetch(list(indices))) if fetch is not None else [self.dataset[index] for index in indices]


class SeededPerPass(Proxy, IterableDataset[Any]):
    """A stream that seeds all generators of its worker, and those of the collator, before each pass but the first.

    For persistent workers: torch seeds them once, so that a later pass would depend on all that they drew before, which
    workers started by a resume have not. Passes are counted from the epoch in which the worker started.
    """

    _inside = "dataset"

    def __init__(self, dataset: Any, seed: int, collator: Any = None) -> None:
        self.dataset, self.seed, self.epoch, self._collator = dataset, seed, 0, collator
        self._num_passes = 0  # that began in this worker

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        inner = getattr(self.dataset, "set_epoch", None)
        if inner is not None:
            inner(epoch)

    def __iter__(self) -> Iterator[Any]:
        worker, epoch = get_worker_info(), self.epoch + self._num_passes
        if worker is not None:
            self._num_passes += 1
            if epoch > 0:
                seed = zlib.crc32(np.asarray([self.seed, epoch, worker.id], dtype=np.int64).tobytes())
                set_seed(seed)
                collator_rng.reseed(self._collator, seed)
        return iter(self.dataset)
