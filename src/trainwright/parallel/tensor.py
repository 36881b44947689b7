"""Matrices divided over processes that compute one batch together: tensor parallel, as the model brings it.

Owns: `TensorParallelStrategy`, which process reads which data, one norm and one optimizer for divided and whole
parameters, and what cannot be done, refused by name before training. Leaves to others: dividing the model
(`parallelize_module` of torch, `tp_plan` of transformers), which is done when a Trainer gets it.

The processes of a group have one copy of the model and read the same batches; to the rest of the code a group is one
process: `num_processes` counts groups, and `process_index` is that of the group.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from trainwright import shards
from trainwright.interop.loaded import is_peft_model
from trainwright.names import some
from trainwright.nested import first_samples, num_samples_in
from trainwright.optim.registry import check_sharded, check_sharded_class
from trainwright.parallel import mesh
from trainwright.parallel.distributed import DistributedStrategy
from trainwright.parallel.engine_choice import parallel_size
from trainwright.parallel.exchange import GradientExchange, subgroup
from trainwright.parallel.strategy import Strategy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class TensorParallelStrategy(DistributedStrategy):
    """Groups of processes with one copy of the model each, data parallel to each other.

    `device_mesh`: that of the group of this process. Raises ValueError, by name, for an argument that cannot work.
    """

    shards_weights = True

    def __init__(self, accelerator: Any, args: Any, device_mesh: DeviceMesh) -> None:
        check_arguments(args)
        super().__init__(accelerator, args)
        self._config = args.accelerator_config
        self._data_seed = args.data_seed if args.data_seed is not None else args.seed
        self.tp_size = device_mesh.size()
        self.is_main = self.process_index == 0
        self.is_first_of_group = device_mesh.get_local_rank() == 0
        groups = _groups(device_mesh)
        self.num_processes = len(groups)
        self.process_index = next(i for i, group in enumerate(groups) if torch.distributed.get_rank() in group)
        self.num_batches_at_once = 1 if args.accelerator_config.split_batches else self.num_processes
        # The same part of the model in each group: what gradients, losses and predictions are exchanged over.
        self._peers = [list(peers) for peers in zip(*groups)]
        self._peer_group: Any = None
        self._checked: weakref.ref[nn.Module] | None = None  # the last model that was
        if self.num_processes > 1:
            self._peer_group = subgroup(self._peers, self._timeout)
        self.repeats_alone = False
        self.averages_gradients = self.num_processes > 1
        if self.scaler is not None:
            self.scaler = accelerator.scaler = _DividedScaler(self.device.type, init_scale=self.scaler.get_scale())

    # -- preparing -----------------------------------------------------------------------------------------------------

    def shard_weights(self, model: nn.Module, optimizer: Any = None) -> None:
        """It is divided already: raise ValueError where it is not, or where what is whole differs within a group."""
        if self._checked is not None and self._checked() is model:
            return
        device_mesh = group_mesh(model)
        if device_mesh is None:
            raise ValueError(
                "parallelism_config asks for tensor parallel, and no weight of the model is divided: build it with "
                "tp_plan='auto', or call parallelize_module before it is given to the Trainer."
            )
        if is_peft_model(model):
            raise ValueError(
                f"{type(model).__name__}: adapters on a model that is divided by tensor parallel cannot be trained "
                "here, since peft computes them on parts of features as if these were whole. Use fsdp='full_shard'."
            )
        _check_whole_ones(model, device_mesh)
        self._checked = weakref.ref(model)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        self.shard_weights(model)
        if self.averages_gradients:
            if self._exchange is not None:  # of an earlier train()
                self._exchange.close()
            self._exchange = GradientExchange(
                model,
                bucket_mib=self._ddp_kwargs.get("bucket_cap_mb"),
                broadcasts_buffers=False,
                timeout=self._timeout,
                peers=self._peers,
            )
        return model

    def prepare(
        self, model: Any, optimizer: Any, scheduler: Any, *, num_training_steps: int, micro_batch: int
    ) -> tuple[Any, Any, Any]:
        """torch's kernels for many tensors at once cannot mix divided and whole ones: its optimizers update each."""
        check_sharded_class(type(optimizer), "tensor parallel")
        _update_one_by_one(optimizer)
        if hasattr(optimizer, "register_load_state_dict_post_hook"):
            optimizer.register_load_state_dict_post_hook(_update_one_by_one)
        return model, optimizer, scheduler

    def prepare_dataloader(self, dataloader: Any, *, is_training: bool = True) -> Any:
        if self.num_processes == 1:
            return Strategy.prepare_dataloader(self, dataloader, is_training=is_training)
        if not is_training and isinstance(dataloader.dataset, IterableDataset):
            raise ValueError(
                f"An evaluation of a stream ({type(dataloader.dataset).__name__}) by {self.num_processes} groups of "
                "tensor parallel is not in this release: pass data with a length."
            )
        from accelerate.data_loader import prepare_data_loader

        return prepare_data_loader(
            dataloader,
            device=self.device,
            num_processes=self.num_processes,
            process_index=self.process_index,
            split_batches=self._config.split_batches,
            even_batches=self._config.even_batches,
            use_seedable_sampler=self._config.use_seedable_sampler,
            data_seed=self._data_seed,
            non_blocking=self._config.non_blocking,
            dispatch_batches=False,
        )

    # -- a step --------------------------------------------------------------------------------------------------------

    def without_grad_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # the groups exchange gradients once per update

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, optimizer: Optimizer) -> torch.Tensor:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return mesh.clip_mixed_meshes(parameters, max_norm)

    @torch.no_grad()
    def norms_of_gradients(self, found: list[torch.Tensor]) -> list[torch.Tensor]:
        return mesh.norms_by_mesh(found)

    # -- collectives over the groups -----------------------------------------------------------------------------------

    def gather(self, value: Any) -> Any:
        if self.num_processes == 1:
            return value
        from accelerate.utils.operations import recursively_apply

        return recursively_apply(self._gather_one, value, error_on_other_type=True)

    def _gather_one(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = (tensor[None] if tensor.ndim == 0 else tensor).contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.num_processes)]
        torch.distributed.all_gather(parts, tensor, group=self._peer_group)
        return torch.cat(parts)

    def gather_for_metrics(self, value: Any) -> Any:
        gathered = self.gather(value)
        state = self.accelerator.gradient_state
        num_rows = num_samples_in(gathered)
        if self.num_processes == 1 or num_rows is None or not state.end_of_dataloader or state.remainder <= 0:
            return gathered
        return first_samples(gathered, int(state.remainder), num_rows)

    def num_own_rows(self, num_rows: int, dataloader: Any) -> int:
        return num_rows if self.num_processes == 1 else super().num_own_rows(num_rows, dataloader)

    def pad_across_processes(self, value: Any, dim: int = 1, pad_index: int = -100) -> Any:
        return value if self.num_processes == 1 else super().pad_across_processes(value, dim, pad_index)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        if self.num_processes == 1:
            return value
        total = value.clone()
        torch.distributed.all_reduce(total, group=self._peer_group)
        return total

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        return self.sum(value.to(self.device)) / self.num_processes

    def gather_objects(self, value: Any) -> list[Any]:
        if self.num_processes == 1:
            return [value]
        of_groups: list[Any] = [None] * self.num_processes
        torch.distributed.all_gather_object(of_groups, value, group=self._peer_group)
        return of_groups

    # -- saving --------------------------------------------------------------------------------------------------------

    def whole_weights(self, model: nn.Module) -> dict[str, Any] | None:
        return shards.whole_weights(model, self.should_save)


def mesh_for(args: Any, model: nn.Module | None) -> DeviceMesh | None:
    """The mesh of the group of this process where `model` is divided, or `parallelism_config` says that the one will be
    that `model_init` builds. None: data parallel alone. Raises ValueError where these contradict each other.
    """
    device_mesh, asked = group_mesh(model), parallel_size(args.parallelism_config, "tp_size")
    if device_mesh is not None:
        if asked not in (1, device_mesh.size()):
            raise ValueError(
                f"parallelism_config: tp_size={asked}, and the model is divided over {device_mesh.size()} processes."
            )
        return device_mesh
    marked = getattr(model, "_tp_size", None)
    if isinstance(marked, int) and marked > 1:
        raise ValueError(
            f"{type(model).__name__} says that it is divided over {marked} processes (tp_plan), and none of its "
            "weights is a DTensor: this release of transformers divides it in a way that cannot be trained here."
        )
    if asked == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    sizes = (args.world_size // asked, asked)
    return init_device_mesh(args.device.type, sizes, mesh_dim_names=("dp", "tp"))["tp"]


def group_mesh(model: Any) -> DeviceMesh | None:
    """The mesh on which weights of `model` are divided by tensor parallel; None: on none.

    Raises ValueError for weights on several meshes, or on one of several dimensions.
    """
    if model is None or hasattr(model, "unshard"):  # what `fully_shard` divided is no matter of this module
        return None
    found: list[Any] = []
    for parameter in model.parameters():
        if shards.is_sharded(parameter) and parameter.device_mesh not in found:
            found.append(parameter.device_mesh)
    if not found:
        return None
    if len(found) > 1 or found[0].ndim != 1:
        raise ValueError(
            f"The weights of {type(model).__name__} are divided over {', '.join(map(str, found))}: this release trains "
            "a model that is divided over one mesh of one dimension, such as mesh['tp']."
        )
    return found[0]  # type: ignore[no-any-return]


def check_arguments(args: Any) -> None:
    """Raise ValueError for arguments that divided matrices cannot do, each by its name, with what to do instead."""
    config = args.accelerator_config
    reasons = {
        "auto_find_batch_size=True": (
            args.auto_find_batch_size,
            "a process that repeats its share alone would wait for the others of its group. Lower "
            "per_device_train_batch_size",
        ),
        "accelerator_config dispatch_batches=True": (
            getattr(config, "dispatch_batches", None),
            "each group reads its batches itself. Leave it out",
        ),
        "train_sampling_strategy='batch_rebalance'": (
            args.train_sampling_strategy == "batch_rebalance",
            "it plans for processes that read different batches. Use 'group_by_length'",
        ),
        "accelerator_config even_batches=False": (
            not getattr(config, "even_batches", True),
            "each group waits for the others in every update, so all need as many batches",
        ),
        "bf16_full_eval=True": (args.bf16_full_eval, "divided weights have one type"),
        "fp16_full_eval=True": (args.fp16_full_eval, "divided weights have one type"),
        "jit_mode_eval=True": (args.jit_mode_eval, "a trace does not hold collectives"),
        "optimizer_in_backward=True": (
            args.optimizer_in_backward,
            "the norm of all gradients is known after the backward pass",
        ),
    }
    for name, (is_asked, reason) in reasons.items():
        if is_asked:
            raise ValueError(f"{name} cannot be used with tensor parallel: {reason}.")
    check_sharded(args, "tensor parallel")


def _groups(device_mesh: DeviceMesh) -> list[tuple[int, ...]]:
    """The ranks of each tensor-parallel group, by their first; a collective. Raises ValueError where the processes do
    not have one part of one copy each.
    """
    mine = tuple(device_mesh.mesh.flatten().tolist())
    of_all: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, mine)
    groups = sorted(set(of_all))
    if sorted(rank for group in groups for rank in group) != list(range(len(of_all))) or len(set(map(len, groups))) > 1:
        raise ValueError(f"The groups of processes over which the model is divided overlap, or differ: {groups}.")
    return groups


@torch.no_grad()
def _check_whole_ones(model: nn.Module, device_mesh: DeviceMesh) -> None:
    """Raise ValueError where a weight that is no DTensor differs between the processes of a group: it is a part that is
    not marked as one (experts, in some releases of transformers), or was initialised differently. A collective.
    """
    plain = {name: p for name, p in model.named_parameters() if not shards.is_sharded(p)}
    mine = [(tuple(p.shape), p.double().sum().item(), p.double().norm().item()) for p in plain.values()]
    of_group: list[Any] = [None] * device_mesh.size()
    torch.distributed.all_gather_object(of_group, mine, group=device_mesh.get_group())
    differing = [name for name, *values in zip(plain, *of_group) if any(repr(one) != repr(values[0]) for one in values)]
    if differing:
        raise ValueError(
            f"{some(differing, 5)}: no DTensor, and different in the processes that have one copy of the model. Load "
            "or seed the model equally in all of them; parts that are ordinary tensors cannot be trained here."
        )


class _DividedScaler(torch.amp.GradScaler):
    """A loss scale over divided and whole gradients, which torch's own cannot look at together: an overflow in one part
    is one in all processes. Each unscales its part.
    """

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if found:
            parts = [shards.local_part(one) for one in found]
            torch._amp_foreach_non_finite_check_and_unscale_(parts, found_inf, inv_scale)
        torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX)
        return {found_inf.device: found_inf}


def _update_one_by_one(optimizer: Any) -> None:
    groups = getattr(optimizer, "param_groups", None) or []
    if len({shards.is_sharded(parameter) for group in groups for parameter in group["params"]}) < 2:
        return
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # of fused kernels: the loss scale asks
        optimizer._step_supports_amp_scaling = False
    for group in groups:
        for name in ("fused", "foreach"):
            if name in group:
                group[name] = False
