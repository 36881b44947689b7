"""Weights, gradients and optimizer state divided over processes: FSDP2, by torch's `fully_shard`.

Owns: `FsdpStrategy`: the mesh, sharding a model in place (`shard_weights`), what a step and a save ask of it, and what
cannot be done with shards, refused by name before training. Leaves to others: which modules are gathered together
(`fsdp_units.py`), the options (`args/fsdp_config.py`), collectives of values (`distributed.py`).

accelerate is only asked for collectives of values: on a CPU it ignores its FSDP plugin and would train with DDP.

A parameter is a DTensor while it is sharded, and another object, a whole tensor, from a forward pass until its backward
pass. So nobody may hold a list of parameters that was made in between, nor swap their `.data`: see `parameters`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainwright import gradients, shards
from trainwright.args.fsdp_config import FsdpConfig
from trainwright.names import some
from trainwright.optim.registry import check_sharded, check_sharded_class
from trainwright.parallel.distributed import DistributedStrategy
from trainwright.parallel.engine_choice import parallel_size
from trainwright.parallel.fsdp_units import units_to_shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)


class FsdpStrategy(DistributedStrategy):
    """Fully sharded data parallelism over the process group.

    Its options are those of `args.fsdp` and `args.fsdp_config`; where the arguments ask for nothing, those that
    `accelerate launch` was given. Raises ValueError, by name, for an argument that cannot work with shards.
    """

    shards_weights = True

    def __init__(self, accelerator: Any, args: Any) -> None:
        check_arguments(args)
        super().__init__(accelerator, args)
        launched = None if args.fsdp else FsdpConfig.from_environment(os.environ)
        self.config = launched or FsdpConfig.parse(args.fsdp, args.fsdp_config)
        self.writes_parts = self.config.state_dict_type == "sharded_state_dict"
        if self.writes_parts and args.save_on_each_node:
            raise ValueError(
                "save_on_each_node=True cannot be used with state_dict_type='sharded_state_dict', whose parts each "
                "process writes itself, into one directory that all share. Leave out one of them."
            )
        if self.config.activation_checkpointing:
            self.checkpointing = {"offload": True} if self.config.activation_checkpointing_offload else {}
        self.repeats_alone = False
        self.mesh = make_mesh(self.device.type, self.config, args.parallelism_config, self.num_processes)
        self._dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self._num_forward_only = 0  # blocks under way in which no backward pass follows
        self._modules: list[Any] = []  # that are gathered one at a time; the model itself is the last

    # -- preparing -----------------------------------------------------------------------------------------------------

    def shard_weights(self, model: nn.Module, optimizer: Any = None) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(model, FSDPModule):  # by an earlier call
            self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
            return
        before = dict(model.named_parameters(remove_duplicate=False))
        divided = next((name for name, parameter in before.items() if shards.is_sharded(parameter)), None)
        if divided is not None:
            raise ValueError(
                f"fsdp with a model that is divided already ({divided}), by tensor parallel for example, is not in "
                "this release: leave out one of them."
            )
        units = units_to_shard(model, self.config)
        options = self._options()
        materialised: dict[int, nn.Parameter] = {}
        for unit in units:
            self._synchronise(unit, materialised)
            fully_shard(unit, reshard_after_forward=self.config.reshard_after_forward, **options)
        self._synchronise(model, materialised)
        # None: the model's own weights are not freed after the forward pass, as the backward pass begins with them.
        fully_shard(model, reshard_after_forward=None if self.config.reshard_after_forward else False, **options)
        self._modules = [*units, model]
        after = dict(model.named_parameters(remove_duplicate=False))
        _check_sharded(before, after)
        if self.config.forward_prefetch:
            for unit, following in zip(self._modules[:-1], self._modules[1:-1]):
                unit.set_modules_to_forward_prefetch([following])
        model.register_forward_hook(self._after_forward)
        if hasattr(model, "generate"):
            self._gather_to_generate(model)
        if optimizer is not None:
            _hand_over(optimizer, {id(parameter): after[name] for name, parameter in before.items()})
        logger.info(
            "FSDP2: %s is sharded over %s processes in %s parts that are gathered one at a time.",
            type(model).__name__,
            self.num_processes,
            len(self._modules),
        )

    def prepare_model(self, model: nn.Module) -> nn.Module:
        self.shard_weights(model)
        return model

    def prepare(
        self, model: Any, optimizer: Any, scheduler: Any, *, num_training_steps: int, micro_batch: int
    ) -> tuple[Any, Any, Any]:
        check_sharded_class(type(optimizer), "fsdp")
        return model, optimizer, scheduler

    def _after_forward(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        """A forward pass that no backward pass follows, such as a callback's, must not leave whole weights behind:
        the next update would not change them, and the next forward pass would use them.
        """
        if not torch.is_grad_enabled() and not self._num_forward_only:
            self.reshard(model)

    def _gather_to_generate(self, model: Any) -> None:
        """Have `model.generate` gather the model's own weights, which it may use outside of `forward`."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, "generate")
        gathering = model.generate

        @functools.wraps(gathering)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with self.forward_only(model):
                return gathering(*args, **kwargs)

        model.generate = generate

    def _options(self) -> dict[str, Any]:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        options: dict[str, Any] = {"mesh": self.mesh}
        if self._dtype is not None:
            # Gradients are summed in float32. No output is cast, which would round the loss, and no input, which would
            # round the labels: autocast decides about both.
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=self._dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        if self.config.offload_params and self.device.type != "cpu":
            options["offload_policy"] = CPUOffloadPolicy()
        return options

    @torch.no_grad()
    def _synchronise(self, unit: nn.Module, materialised: dict[int, nn.Parameter]) -> None:
        """Give `unit` the weights and buffers of process 0, but for what is sharded already, on the device.

        Of a large model only one unit is whole in the memory of the device at a time.
        """
        for module in unit.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    empty = torch.empty_like(parameter, device=self.device)
                    module._parameters[name] = materialised.setdefault(
                        id(parameter), nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)
        tensors = [*unit.parameters(), *unit.buffers()]
        for tensor in tensors:
            if shards.is_sharded(tensor):
                continue
            if tensor.device.type != self.device.type:
                tensor.data = tensor.data.to(self.device)
            if self.config.sync_module_states and self.num_processes > 1:
                values = tensor.data.contiguous()
                torch.distributed.broadcast(values, src=0)
                if self.process_index != 0:
                    tensor.data.copy_(values)

    # -- a step --------------------------------------------------------------------------------------------------------

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        self.reshard(model)
        return list(model.parameters())

    def reshard(self, model: nn.Module) -> None:
        for module in self._modules:
            module.reshard()

    @contextlib.contextmanager
    def forward_only(self, model: nn.Module) -> Iterator[None]:
        self._num_forward_only += 1
        try:
            yield
        finally:
            self._num_forward_only -= 1
            if not self._num_forward_only:
                self.reshard(model)

    @contextlib.contextmanager
    def without_grad_sync(self, model: nn.Module) -> Iterator[None]:
        """Gradients are added up whole, on each process, until the last micro-batch: less communication, more memory
        (`sync_each_batch` in `gradient_accumulation_kwargs` does the reverse).
        """
        if self._syncs_each_batch or not self._modules:
            yield
            return
        root = self._modules[-1]
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    @torch.no_grad()
    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, optimizer: Optimizer) -> torch.Tensor:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)  # torch's, which knows DTensors: an overflow in one part is one in all
        local = [shards.local_part(one) for one in gradients.gradients_of(parameters)]
        norm = self._norm(local)
        # Multiplied also where nothing is clipped: a condition would be a host sync.
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if local:
            torch._foreach_mul_(local, factor.to(local[0].device))
        return norm

    @torch.no_grad()
    def norms_of_gradients(self, found: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self._norm([shards.local_part(one) for one in found])]

    def _norm(self, local: list[torch.Tensor]) -> torch.Tensor:
        """The norm of all gradients, of which each process has a part: one sum over processes, of float64, whose
        squares do not overflow.
        """
        norms = gradients.norms_of(local) if local else [torch.zeros((), device=self.device)]
        squares = torch.stack([norm.to(self.device, torch.float64) for norm in norms]).square().sum()
        torch.distributed.all_reduce(squares, group=self._shard_group)
        return squares.sqrt().float()

    @property
    def _shard_group(self) -> Any:
        return self.mesh.get_group(self.mesh.ndim - 1)

    # -- saving and loading --------------------------------------------------------------------------------------------

    def whole_copy(self, model: nn.Module) -> nn.Module | None:
        self.reshard(model)
        weights = shards.whole_weights(model, self.should_save)
        return _copy_with(model, weights) if self.should_save else None

    def whole_weights(self, model: nn.Module) -> dict[str, Any] | None:
        self.reshard(model)
        return shards.whole_weights(model, self.should_save, _names_to_save(model))


def _copy_with(model: nn.Module, weights: dict[str, Any]) -> nn.Module:
    """A copy of a sharded `model` that has whole `weights` and nothing of what sharded it: no hooks, and its own class.

    FSDP2 refuses `copy.deepcopy`: what is not to be copied is named to it as copied already.
    """
    from torch.distributed.fsdp import FSDPModule

    copied: dict[int, Any] = {
        id(one): nn.Parameter(weights[name], requires_grad=one.requires_grad)
        for name, one in model.named_parameters(remove_duplicate=False)
    }
    classes: dict[Any, Any] = {one: type(one) for one in model.modules() if isinstance(one, FSDPModule)}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, dict) and ("hooks" in name or not isinstance(name, str) or "composable" in name):
                copied[id(value)] = type(value)()
    try:
        for module, cls in classes.items():
            module.__class__ = cls.__mro__[2]  # behind the one that `fully_shard` made, and FSDPModule
        result = copy.deepcopy(model, copied)
    finally:
        for module, cls in classes.items():
            module.__class__ = cls
    vars(result).pop("generate", None)  # ours, which gathers
    return result


def check_arguments(args: Any) -> None:
    """Raise ValueError for arguments that shards cannot do, each by its name, with what to do instead."""
    even = getattr(args.accelerator_config, "even_batches", True)
    reasons = {
        "auto_find_batch_size=True": (
            args.auto_find_batch_size,
            "a process that runs out of memory amid a pass leaves the others in an exchange of weights, where nothing "
            "can tell them to repeat it. Lower per_device_train_batch_size",
        ),
        "accelerator_config even_batches=False": (
            not even,
            "each batch gathers weights from all processes, so all need as many batches",
        ),
        "bf16_full_eval=True": (
            args.bf16_full_eval,
            "weights are gathered in the type that they were sharded for. With bf16=True that is bfloat16, also in "
            "evaluations",
        ),
        "fp16_full_eval=True": (
            args.fp16_full_eval,
            "weights are gathered in the type that they were sharded for. With fp16=True that is float16, also in "
            "evaluations",
        ),
        "jit_mode_eval=True": (args.jit_mode_eval, "a trace does not gather weights"),
        "optimizer_in_backward=True": (args.optimizer_in_backward, "gradients are summed after the backward pass"),
    }
    for name, (is_asked, reason) in reasons.items():
        if is_asked:
            raise ValueError(f"{name} cannot be used with fsdp: {reason}.")
    check_sharded(args, "fsdp")


def make_mesh(device_type: str, config: FsdpConfig, parallelism: Any, num_processes: int) -> DeviceMesh:
    """A mesh of all processes: one dimension that shards, behind one that replicates where that is asked for.

    `parallelism`: accelerate's ParallelismConfig, or None. Raises ValueError for sizes that do not fit.
    """
    from torch.distributed.device_mesh import init_device_mesh

    num_replicas = 1
    if parallelism is not None:
        others = {name: parallel_size(parallelism, name) for name in ("tp_size", "cp_size", "sp_size")}
        for name, size in others.items():
            if size > 1:
                raise ValueError(f"parallelism_config: {name}={size} together with fsdp is not in this release.")
        num_replicas = parallel_size(parallelism, "dp_replicate_size")
        num_shards = parallel_size(parallelism, "dp_shard_size")
        if num_replicas * num_shards != num_processes:
            raise ValueError(
                f"parallelism_config: dp_replicate_size={num_replicas} x dp_shard_size={num_shards} is "
                f"{num_replicas * num_shards} processes, and this run has {num_processes}."
            )
    elif config.replicates_over_nodes:
        of_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
        if num_processes % of_node:
            raise ValueError(
                f"fsdp='hybrid_shard' needs as many processes on each node; there are {num_processes}, {of_node} of "
                "them on this one."
            )
        num_replicas = num_processes // of_node
    if num_replicas == 1:
        return init_device_mesh(device_type, (num_processes,), mesh_dim_names=("dp_shard",))
    shape = (num_replicas, num_processes // num_replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def _check_sharded(before: dict[str, nn.Parameter], after: dict[str, nn.Parameter]) -> None:
    """Raise RuntimeError where a parameter is whole, or no longer tied to another."""
    plain = [name for name, parameter in after.items() if not shards.is_sharded(parameter)]
    if plain:
        raise RuntimeError(f"FSDP2 did not shard {some(plain, 5)}: these would be trained by each process alone.")
    first: dict[int, str] = {}
    for name, parameter in before.items():
        tied_to = first.setdefault(id(parameter), name)
        if after[name] is not after[tied_to]:
            raise RuntimeError(f"FSDP2 would untie {name} from {tied_to}: set auto_wrap_policy='no_wrap'.")


def _hand_over(optimizer: Any, sharded: dict[int, nn.Parameter]) -> None:
    """Have a given optimizer train the shards in place of the whole parameters that it was built with.

    Raises ValueError where it holds others, or has stepped already.
    """
    name = type(optimizer).__name__
    if getattr(optimizer, "state", None):
        raise ValueError(
            f"optimizers=: {name} has a state of whole parameters, which fsdp cannot divide. Pass one that has not "
            "stepped, or optimizer_cls_and_kwargs=(class, kwargs)."
        )
    for group in optimizer.param_groups:
        unknown = [p for p in group["params"] if id(p) not in sharded]
        if unknown:
            raise ValueError(
                f"optimizers=: {name} holds {len(unknown)} parameters that are not the model's, the first of shape "
                f"{tuple(unknown[0].shape)}: with fsdp it would train nothing. Build it from model.parameters() of the "
                "model that Trainer gets, or pass optimizer_cls_and_kwargs=(class, kwargs)."
            )
        group["params"][:] = [sharded[id(parameter)] for parameter in group["params"]]


def _names_to_save(model: Any) -> set[str] | None:
    """Of a model with adapters, the tensors that peft may save: the base is in no checkpoint. None: all."""
    config = getattr(model, "peft_config", None)
    base = getattr(model, "base_model", None)
    prefix = getattr(base, "prefix", None)
    if not config or not isinstance(prefix, str):
        return None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name for name in model.state_dict() if name in trained or prefix in name or "modules_to_save" in name}
