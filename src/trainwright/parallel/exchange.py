"""Gradients averaged over ranks once per update instead of during the backward pass.

Owns: `GradientExchange`: the same weights on every rank, one average per update, buffers of rank 0. Leaves to others:
what runs between two averages. DistributedDataParallel reduces gradients during the last backward pass of an update, so
every rank must make that pass, exactly once. Here a rank may repeat its share of an update, in as many passes as its
memory needs, independently of the others.

Cost: communication does not overlap with the backward pass, and one byte per parameter is reduced between the hosts, so
that all ranks know a parameter that only some of them used.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from trainwright.shards import local_part

MIB = 1 << 20


class GradientExchange:
    """All methods are collectives: every rank calls them, in the same order.

    `bucket_mib`: gradients reduced together, which is also the memory that an exchange needs. `peers`: the ranks of
    each group that exchanges, where not all do together. Raises ValueError for a model with sparse gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        bucket_mib: float | None = None,
        broadcasts_buffers: bool = True,
        timeout: datetime.timedelta | None = None,
        peers: list[list[int]] | None = None,
    ) -> None:
        for name, module in model.named_modules():
            if getattr(module, "sparse", False) is True:
                raise ValueError(
                    f"auto_find_batch_size=True cannot average the sparse gradients of {name or type(module).__name__} "
                    "over several processes. Leave it out and lower per_device_train_batch_size, or use sparse=False."
                )
        self._bucket_bytes = int((25 if bucket_mib is None else bucket_mib) * MIB)
        self._broadcasts_buffers = broadcasts_buffers
        everyone = [list(range(torch.distributed.get_world_size()))]
        ranks = everyone if peers is None else peers
        self._num_processes = len(ranks[0])
        self._group = subgroup(ranks, timeout) if peers is not None else torch.distributed.group.WORLD
        self._hosts = subgroup(ranks, timeout, backend="gloo")
        self._broadcast([*(local_part(p.data) for p in model.parameters()), *model.buffers()])

    def begin(self, model: nn.Module) -> None:
        """An update begins: broadcast the buffers of rank 0, as DistributedDataParallel does."""
        if self._broadcasts_buffers:
            self._broadcast(list(model.buffers()))

    @torch.no_grad()
    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over all ranks. One that a rank does not have counts as zeros; one that none
        has stays None.
        """
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        used = torch.tensor([parameter.grad is not None for parameter in trainable], dtype=torch.uint8)
        torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX, group=self._hosts)
        gradients = []
        for parameter, is_used in zip(trainable, used.tolist()):
            if is_used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(local_part(parameter.grad))
        for bucket in self._buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).mul_(1 / self._num_processes)
            torch.distributed.all_reduce(flat, group=self._group)
            _copy_back(flat, bucket)

    def close(self) -> None:
        """Destroy the process group."""
        torch.distributed.destroy_process_group(self._hosts)

    @torch.no_grad()
    def _broadcast(self, tensors: list[torch.Tensor]) -> None:
        for bucket in self._buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.broadcast(flat, group=self._group, group_src=0)
            if torch.distributed.get_rank(self._group) != 0:
                _copy_back(flat, bucket)

    def _buckets(self, tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Tensors of one type on one device, in order, together at most a bucket, but at least one."""
        kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for same in kinds.values():
            bucket: list[torch.Tensor] = []
            num_bytes = 0
            for tensor in same:
                size = tensor.numel() * tensor.element_size()
                if bucket and num_bytes + size > self._bucket_bytes:
                    yield bucket
                    bucket, num_bytes = [], 0
                bucket.append(tensor)
                num_bytes += size
            yield bucket


def subgroup(ranks: list[list[int]], timeout: datetime.timedelta | None, backend: str | None = None) -> Any:
    """The group of this process among those of `ranks`, which all processes make together."""
    return torch.distributed.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
        ranks, timeout=timeout, backend=backend
    )[0]


def _copy_back(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    for tensor, values in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors])):
        tensor.copy_(values.view_as(tensor))
