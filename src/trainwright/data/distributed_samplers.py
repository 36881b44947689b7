"""Samplers that give each process its share of a data set.

Owns: sharding by index or by position in a stream. Leaves to others: a single process's order (samplers), and what
accelerate shards itself. Source: `api.json` of both generations; shares equal those of the installed releases.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, Sampler

from trainwright.data.resumable_sampler import seeded
from trainwright.interop.optional import require


def _process(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """`(num_replicas, rank)`, asked of the running process group where not given."""
    if (num_replicas is None or rank is None) and not dist.is_initialized():
        raise RuntimeError(
            "num_replicas and rank were not given and no process group is running to ask. Pass both, or start the "
            "script with torchrun or accelerate launch."
        )
    return (dist.get_world_size() if num_replicas is None else num_replicas, dist.get_rank() if rank is None else rank)


def _padded_length(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


class DistributedSamplerWithLoop(DistributedSampler[Any]):
    """torch's `DistributedSampler`, whose last batch is filled up from the beginning of the process's share.

    The processes that hold one sample more than the others begin with their second, so that less is repeated.
    """

    def __init__(self, dataset: Any, batch_size: int, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        share = list(super().__iter__())
        missing = -len(share) % self.batch_size
        begin = int(self.rank < len(self.dataset) % self.num_replicas)  # type: ignore[arg-type]
        return iter([*share, *(share[(begin + place) % len(share)] for place in range(missing))])


class SequentialDistributedSampler(Sampler[int]):
    """One contiguous share per process, all of equal length; the tail is filled up from the beginning.

    With `batch_size` each share is a whole number of batches, so gathered predictions stay in order.
    """

    def __init__(
        self, dataset: Any, num_replicas: int | None = None, rank: int | None = None, batch_size: int | None = None
    ) -> None:
        self.dataset = dataset
        self.num_replicas, self.rank = _process(num_replicas, rank)
        self.batch_size = batch_size
        self.num_samples = _padded_length(-(-len(dataset) // self.num_replicas), batch_size or 1)
        self.total_size = self.num_samples * self.num_replicas

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        begin = self.rank * self.num_samples
        return (place % len(self.dataset) for place in range(begin, begin + self.num_samples))


class ShardSampler(Sampler[int]):
    """Batches dealt out in turn: process 0 gets the first `batch_size` samples, process 1 the next, and so on.

    The tail is filled up from the beginning, or dropped with `drop_last`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.total_batch_size = batch_size * num_processes

    def __len__(self) -> int:
        length = len(self.dataset)  # type: ignore[arg-type]
        num_rounds = length // self.total_batch_size if self.drop_last else -(-length // self.total_batch_size)
        return num_rounds * self.batch_size

    def __iter__(self) -> Iterator[int]:
        length = len(self.dataset)  # type: ignore[arg-type]
        for done in range(0, len(self), self.batch_size):
            begin = done * self.num_processes + self.process_index * self.batch_size
            yield from (place % length for place in range(begin, begin + self.batch_size))


class IterableDatasetShard(IterableDataset[Any]):
    """`ShardSampler` for a stream: every process reads all of it and uses its batches.

    A data set with a `set_epoch` shuffles itself; one with a torch `generator` is seeded by `seed + epoch`,
    so that all processes see one order. `num_examples` counts what was read.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.epoch = 0
        self.num_examples = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        sampler = ShardSampler(self.dataset, self.batch_size, self.drop_last, self.num_processes, self.process_index)
        return len(sampler)

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.dataset, "generator", None)
        if not hasattr(self.dataset, "set_epoch") and isinstance(generator, type(seeded(0))):
            generator.manual_seed(self.seed + self.epoch)
        size = self.batch_size * self.num_processes
        share = slice(self.process_index * self.batch_size, (self.process_index + 1) * self.batch_size)
        self.num_examples = 0
        stream = iter(self.dataset)
        head: list[Any] = []
        while samples := list(islice(stream, size)):
            self.num_examples += len(samples)
            head = head or samples
            if len(samples) < size:
                if self.drop_last:
                    return
                while len(samples) < size:
                    samples += head[: size - len(samples)]
            yield from samples[share]


def get_tpu_sampler(dataset: Dataset[Any], batch_size: int) -> Sampler[Any]:
    """The sampler of one TPU core: torch's random order where there is one core, else this core's share."""
    xla = require("torch_xla.core.xla_model", "Training on TPU", package="torch_xla")
    world_size, rank = _xla_process(xla)
    if world_size <= 1:
        from torch.utils.data import RandomSampler

        return RandomSampler(dataset)  # type: ignore[arg-type]
    return DistributedSampler(dataset, num_replicas=world_size, rank=rank)


def _xla_process(xla: Any) -> tuple[int, int]:
    """`(world size, rank)`. `torch_xla.runtime` has them since 2.0, `xla_model` before."""
    if hasattr(xla, "xrt_world_size"):
        return int(xla.xrt_world_size()), int(xla.get_ordinal())
    runtime = require("torch_xla.runtime", "Training on TPU", package="torch_xla")
    return int(runtime.world_size()), int(runtime.global_ordinal())


def get_dataloader_sampler(dataloader: Any) -> Any:
    """The sampler that decides on the order, however deep it is wrapped in batch samplers; None where there is none."""
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    if batch_sampler is not None:
        return get_dataloader_sampler(batch_sampler)
    return getattr(dataloader, "sampler", None)
