"""Data parallelism over several processes, through accelerate.

Owns: `Strategy` by an Accelerator. Leaves to others: starting the processes (torchrun, accelerate
launch), and building the Accelerator.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from trainwright import nested
from trainwright.data.loaders import has_length
from trainwright.data.rebalance import BatchRebalanceSampler
from trainwright.nested import first_samples, num_samples_in
from trainwright.parallel.exchange import GradientExchange
from trainwright.parallel.strategy import Strategy
from trainwright.shards import is_sharded


class DistributedStrategy(Strategy):
    """DistributedDataParallel over the process group; with `auto_find_batch_size` the plain model, and one all-reduce
    of gradients per update.

    Raises ValueError for `auto_find_batch_size_mode="restart"`, which several processes cannot agree on.
    """

    is_distributed = True

    def __init__(self, accelerator: Any, args: Any) -> None:
        super().__init__(accelerator.device, fp16=args.fp16)
        self.accelerator = accelerator
        if accelerator.scaler is not None:  # accelerate makes none on a CPU
            self.scaler = accelerator.scaler
        accelerator.scaler = self.scaler
        self.num_processes = accelerator.num_processes
        self.process_index = accelerator.process_index
        self.is_main = self.process_index == 0
        self.num_processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.num_processes))
        self._batches_are_even = bool(args.accelerator_config.even_batches)
        self.num_batches_at_once = 1 if args.accelerator_config.split_batches else self.num_processes
        self._ddp_kwargs = _ddp_arguments(args)
        self._timeout = args.ddp_timeout_delta
        self._syncs_each_batch = bool(
            (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch")
        )
        self.repeats_alone = self.averages_gradients = bool(args.auto_find_batch_size)
        self._exchange: GradientExchange | None = None
        if args.auto_find_batch_size and self._syncs_each_batch:
            raise ValueError(
                "accelerator_config: sync_each_batch=True exchanges gradients after every micro-batch, and "
                "auto_find_batch_size with several processes once per update: leave out one of them."
            )
        if args.auto_find_batch_size and args.auto_find_batch_size_mode == "restart":
            raise ValueError(
                "auto_find_batch_size_mode='restart' needs a run with one process: the others do not know that this "
                "one ran out of memory and starts over. Use 'split' (the default), with which each process cuts its "
                "own micro-batches."
            )

    def prepare_model(self, model: nn.Module) -> nn.Module:
        if self.repeats_alone:
            if self._exchange is not None:  # of an earlier train()
                self._exchange.close()
            self._exchange = GradientExchange(
                model,
                bucket_mib=self._ddp_kwargs.get("bucket_cap_mb"),
                broadcasts_buffers=self._ddp_kwargs.get("broadcast_buffers", True),
                timeout=self._timeout,
            )
            return model
        divided = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
        if divided is not None:
            raise ValueError(
                f"{divided} is divided over processes, in a model that the Trainer did not get when it was made: pass "
                "it as model=, or say parallelism_config=ParallelismConfig(tp_size=...)."
            )
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        replicated = nn.parallel.DistributedDataParallel(model, device_ids=device_ids, **self._ddp_kwargs)
        # Attributes are freed in the order in which they were set. A group that `destroy_process_group` has left to the
        # reducer alone is freed under the GIL and joins gloo's threads. With torch 2.13 that never ends where one of
        # them still holds an all-reduce of a backward pass, whose Python context needs the GIL to be freed. The handle
        # of Python gives the GIL up first.
        replicated.process_group = vars(replicated).pop("process_group")
        return replicated

    def prepare_dataloader(self, dataloader: Any, *, is_training: bool = True) -> Any:
        if isinstance(dataloader.batch_sampler, BatchRebalanceSampler):  # it shards by rank itself
            return super().prepare_dataloader(dataloader, is_training=is_training)
        dispatches, is_stream = self.accelerator.dispatch_batches, isinstance(dataloader.dataset, IterableDataset)
        if dispatches is None and is_stream and (not is_training or self.num_batches_at_once == 1):
            # Only who reads the whole stream knows how many of its last samples are repeated, and accelerate counts the
            # split batches of a share wrongly. In training each process reads for itself.
            dispatches = True
        if not self._batches_are_even and not dispatches:
            self._check_batches(dataloader.batch_sampler)
        # Batches that rank 0 reads for all are sent between devices; others are moved when they are needed. accelerate
        # dispatches a stream by itself where it may place it.
        prepared = self.accelerator.prepare_data_loader(dataloader, device_placement=bool(dispatches))
        shard = prepared.dataset
        if type(shard).__name__ == "IterableDatasetShard" and has_length(shard.dataset):
            # What accelerate finds the repeated samples of the last round by: without these, numbers of one share.
            shard.total_dataset_length = len(shard.dataset)
            prepared.batch_sampler.num_processes = self.num_processes
        return prepared

    def _check_batches(self, batches: Any) -> None:
        """Raise ValueError for batches that one process has more of than another, which it would wait for in vain."""
        if batches is None or not has_length(batches) or getattr(batches, "drop_last", False):
            return
        num_batches, size, samples = (
            len(batches),
            getattr(batches, "batch_size", None) or 1,
            getattr(batches, "sampler", ()),
        )
        if self.num_batches_at_once > 1:
            fits = num_batches % self.num_processes == 0
        else:  # each batch is split, and the last one may have nothing for the last process
            last = len(samples) % size if has_length(samples) else 0
            fits = last == 0 or last > size // self.num_processes * (self.num_processes - 1)
        if not fits:
            raise ValueError(
                f"accelerator_config: even_batches=False leaves {num_batches} batches of {size} as they are, and the "
                f"{self.num_processes} processes would not have the same number: one would wait for the others without "
                "end. Set even_batches=True, dataloader_drop_last=True, or another batch size."
            )

    def without_grad_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        if self._syncs_each_batch or not isinstance(model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()  # type: ignore[no-any-return]

    def begin_update(self, model: nn.Module) -> None:
        if self._exchange is not None:
            self._exchange.begin(model)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self._exchange is not None:
            self._exchange.average(parameters)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, optimizer: Optimizer) -> torch.Tensor:
        return super().clip_grad_norm(parameters, max_norm, optimizer)  # with DDP every rank has the same gradients

    def gather(self, value: Any) -> Any:
        return self._gather(value, self.accelerator.gather)

    def gather_for_metrics(self, value: Any) -> Any:
        return self._gather(value, self.accelerator.gather_for_metrics)

    def _gather(self, value: Any, gather: Callable[[Any], Any]) -> Any:
        """`gather(value)`; without `even_batches` also of tensors whose first dimension differs between processes, for
        which torch would abort the process. Nothing in those is repeated."""
        counts = [] if self._batches_are_even else self.gather_objects(num_samples_in(value))
        if len(set(counts)) < 2:
            return gather(value)
        gathered = self.accelerator.gather(self.accelerator.pad_across_processes(value, dim=0))
        own = torch.cat([torch.arange(count) + rank * max(counts) for rank, count in enumerate(counts)])
        return nested.map(lambda leaf: leaf[own.to(leaf.device)], gathered)

    def num_own_rows(self, num_rows: int, dataloader: Any) -> int:
        state = self.accelerator.gradient_state
        if state.active_dataloader is not dataloader or not state.end_of_dataloader or state.remainder <= 0:
            return num_rows
        # The samples of the last round, over all processes in turn, and the repeated ones behind them.
        first = int(self.process_index) * num_rows
        return min(max(int(state.remainder) - first, 0), num_rows)

    def without_repeats(self, value: Any, dataloader: Any) -> Any:
        num_rows = num_samples_in(value)
        return value if num_rows is None else first_samples(value, self.num_own_rows(num_rows, dataloader), num_rows)

    def pad_across_processes(self, value: Any, dim: int = 1, pad_index: int = -100) -> Any:
        return self.accelerator.pad_across_processes(value, dim=dim, pad_index=pad_index)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, reduction="sum")  # type: ignore[no-any-return]

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all ranks, on this rank's device; no host sync."""
        return self.accelerator.reduce(value.to(self.device), reduction="mean")  # type: ignore[no-any-return]

    def mean_of_floats(self, values: list[float]) -> list[float]:
        return self.mean(torch.tensor(values, dtype=torch.float32)).tolist()  # type: ignore[no-any-return]

    def gather_objects(self, value: Any) -> list[Any]:
        return _of_all(value)

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def staged(self, stage: Callable[[], contextlib.AbstractContextManager[str]]) -> Iterator[str]:
        """Process 0, or the first one of each machine with `save_on_each_node`, stages and says where; all write there;
        it commits when the last one is done. What fails in one process fails in all, so that none waits for another
        that is gone.
        """
        stack, staging, error = contextlib.ExitStack(), None, None
        try:
            if self.should_save:
                staging = stack.enter_context(stage())
        except Exception as caught:
            error = caught
        of_all, rank = _of_all((self.should_save, staging)), torch.distributed.get_rank()
        if all(where is not None for saves, where in of_all if saves):
            try:  # the ranks of a machine come one after the other, and the first of them stages
                yield [where for saves, where in of_all[: rank + 1] if saves][-1]
            except Exception as caught:
                error = caught
        failed = self.first_error(error)
        try:
            if failed is not None:
                stack.__exit__(type(failed), failed, failed.__traceback__)  # rank 0 removes what it staged
            else:
                stack.close()
        except Exception as caught:
            error = caught
        failed = failed or self.first_error(error)
        if failed is not None:
            raise failed

    def first_error(self, error: Exception | None) -> Exception | None:
        where = f"(in process {torch.distributed.get_rank()})"
        found: Exception | None = None
        if isinstance(error, OSError):
            found = OSError(error.errno, f"{error} {where}")
        elif getattr(error, "concerns_all", False):
            found = error
        elif error is not None:
            found = RuntimeError(f"{type(error).__name__}: {error} {where}")
        of_all = _of_all(found)  # also where this rank has an error: the others wait for it
        return error or next((other for other in of_all if other is not None), None)


def _of_all(value: Any) -> list[Any]:
    """One value of each rank, in rank order: one collective where all are small, of which torch's `all_gather_object`
    makes two, since it asks for their sizes first. A pickle that is longer than a packet has its rest in a second one.
    """
    pickled = pickle.dumps(value)
    sizes: list[int] = []
    starts: list[bytes] = []
    for packet in _bytes_of_all(len(pickled).to_bytes(_SIZE_BYTES, "little") + pickled, _PACKET_BYTES):
        sizes.append(int.from_bytes(packet[:_SIZE_BYTES], "little"))
        starts.append(packet[_SIZE_BYTES:])
    room = _PACKET_BYTES - _SIZE_BYTES
    rests = _bytes_of_all(pickled[room:], max(sizes) - room) if max(sizes) > room else [b""] * len(sizes)
    return [pickle.loads((start + rest)[:size]) for size, start, rest in zip(sizes, starts, rests)]


_SIZE_BYTES = 8
_PACKET_BYTES = 16384  # a save's largest value, the states of three random generators, takes about eleven thousand


def _bytes_of_all(own: bytes, size: int) -> list[bytes]:
    """The first `size` bytes of each rank's, which are padded to as many."""
    where = "cpu" if "cpu:" in torch.distributed.get_backend_config() else torch.accelerator.current_accelerator()
    sent = torch.frombuffer(bytearray(own[:size].ljust(size, b"\0")), dtype=torch.uint8).to(where)
    received = [torch.empty_like(sent) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(received, sent)
    return [one.cpu().numpy().tobytes() for one in received]


def _ddp_arguments(args: Any) -> dict[str, Any]:
    """Keyword arguments of DistributedDataParallel that the user set."""
    wanted = {
        "find_unused_parameters": args.ddp_find_unused_parameters,
        "bucket_cap_mb": args.ddp_bucket_cap_mb,
        "broadcast_buffers": args.ddp_broadcast_buffers,
        "static_graph": args.ddp_static_graph,
    }
    return {name: value for name, value in wanted.items() if value is not None}
