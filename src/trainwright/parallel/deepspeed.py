"""DeepSpeed's ZeRO 1, 2 and 3: optimizer state, gradients and weights in parts, one per process.

Owns: `DeepSpeedStrategy`, the one place that imports deepspeed (inside functions): building the engine, one update
through it, weights that are in parts (gathered, loaded, looked at). Leaves to others: its configuration
(`deepspeed_config.py`), its files in a checkpoint (`deepspeed_checkpoint.py`), data and collectives (`distributed.py`).

The engine is driven update by update: this package decides which micro-batch is the last of an update, and has the norm
of the gradients before the step (DeepSpeed takes it in its step), so that an update may be looked at and left out.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from trainwright.args.device import BACKENDS
from trainwright.interop.optional import MissingExtra, is_installed
from trainwright.nested import map_items
from trainwright.parallel import deepspeed_checkpoint
from trainwright.parallel import deepspeed_config as settings
from trainwright.parallel.distributed import DistributedStrategy

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

SUPPORTED = "0.19"  # the release whose private names are used here, and tests run
# What is used of an engine and of the optimizer that it wraps around the run's, beyond what DeepSpeed documents.
_OF_ENGINE = ("_config", "_scheduler_from_config", "basic_optimizer", "set_gradient_accumulation_boundary")
_OF_OPTIMIZER = ("averaged_gradients", "clip_grad", "loss_scale", "micro_step_id", "refresh_fp32_params")
OLD_LOCK_S = 600.0  # three times what the slowest build of an operator took on two busy cores
YOUNG_LOCK_S = 60.0


class DeepSpeedStrategy(DistributedStrategy):
    """Training through a `deepspeed.DeepSpeedEngine`; also with one process, which then is a group of one.

    Raises MissingExtra without the package, ValueError for a configuration that is no good, contradicts the arguments,
    or asks for what this engine does not do, all at once.
    """

    repeats_alone = False
    autocasts = False  # the weights have their precision, and the engine switches autocast off in its forward pass
    measures_norm = True
    places_model = True

    def __init__(
        self, build_accelerator: Callable[[], Any], args: TrainingArguments, *, client_optimizer: bool = False
    ) -> None:
        if not is_installed("deepspeed"):
            raise MissingExtra("deepspeed=", "deepspeed", "deepspeed")
        check_age(version("deepspeed"))
        given = settings.requested(args)
        self._given, self._args = given, args
        _become_a_group(args)
        settings.check_supported(given, args, device_type=args.device.type, client_optimizer=client_optimizer)
        settings.filled(given, args, num_processes=torch.distributed.get_world_size())  # contradictions, now
        if args.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            check_build_locks()
        find_ninja()
        self._deepspeed: Any = importlib.import_module("deepspeed")
        _check_accelerator(args)
        _be_quiet(args)
        super().__init__(build_accelerator(), args)
        self.scaler = self.accelerator.scaler = None  # the engine scales fp16 losses itself
        self.accelerator.backward = self._backward_of_accelerator
        self.stage = given.stage
        self.shards_weights = given.stage == 3
        self.engine: Any = None
        self._optimizer: Any = None  # that the engine wraps around the one of the run
        self._norm: torch.Tensor | None = None  # of the gradients of the update under way
        self._casting: Any = None  # the hook that gives inputs the precision of the weights
        if settings.get(given.config, "optimizer.type", None) is not None:
            self.optimizer_cls_and_kwargs = (ConfiguredOptimizer, {"lr": args.learning_rate})

    # -- preparing -----------------------------------------------------------------------------------------------------

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model  # `prepare` wraps it together with the optimizer

    def prepare(
        self, model: Any, optimizer: Any, scheduler: Any, *, num_training_steps: int, micro_batch: int
    ) -> tuple[Any, Any, Any]:
        """(engine, optimizer, schedule). The optimizer is the run's, which holds flat parts of the weights from here
        on, or that of the configuration; likewise the schedule."""
        config = settings.filled(
            self._given,
            self._args,
            num_processes=self.num_processes,
            micro_batch=micro_batch,
            hidden_size=settings.hidden_size_of(model),
            num_training_steps=num_training_steps,
        )
        settings.check_filled(config)
        if self.has_divided(optimizer):  # of an earlier train()
            if "scheduler" in config:
                self.engine._config.scheduler_params = config["scheduler"].get("params")
                scheduler = self.engine._scheduler_from_config(self._optimizer)
            return self.engine, optimizer, scheduler
        self.release_model()
        config["zero_allow_untested_optimizer"] = True  # checked, or vouched for: `settings.check_supported`
        config.setdefault("zero_force_ds_cpu_optimizer", False)
        if self.device.type == "cpu" and str(settings.get(config, "optimizer.type", "")).lower() in ("adam", "adamw"):
            config["optimizer"].setdefault("params", {}).setdefault("torch_adam", True)  # else it compiles another
        is_configured = isinstance(optimizer, ConfiguredOptimizer)
        drop_empty_groups(optimizer, scheduler)
        self.engine, engine_optimizer, _, scheduler_of_engine = self._deepspeed.initialize(
            model=model,
            optimizer=None if is_configured else optimizer,
            model_parameters=groups_as_built(optimizer) if is_configured else None,
            config=config,
        )
        check_release(self.engine, engine_optimizer, self._name_of_norm, version("deepspeed"))
        self._optimizer = engine_optimizer
        _tell_accelerate(self.accelerator, config)
        self.engine.lr_scheduler = self.engine.client_lr_scheduler = None  # this package steps it
        self.engine.set_gradient_accumulation_boundary(True)
        if self.input_dtype is not None:
            self._casting = model.register_forward_pre_hook(self._cast_inputs, with_kwargs=True)
        self._take_norm_before_step(engine_optimizer)
        real = self.engine.basic_optimizer
        if scheduler_of_engine is not None:
            scheduler = scheduler_of_engine
        elif is_configured and scheduler is not None:
            LambdaLR(real, lambda _: 1.0)  # a schedule marks the step of its optimizer, and warns where none did
            scheduler.optimizer = real
            for group, then in zip(real.param_groups, optimizer.param_groups, strict=True):
                group["lr"], group["initial_lr"] = then["lr"], then.get("initial_lr", then["lr"])
        return self.engine, real, scheduler

    def has_divided(self, optimizer: Any) -> bool:
        return self.engine is not None and self.engine.basic_optimizer is optimizer

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What floating-point inputs are to be; None: as they come."""
        if self._args.bf16:
            return torch.bfloat16
        return torch.float16 if self._args.fp16 else None

    def _cast_inputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        def cast(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(self.input_dtype) if value.is_floating_point() else value
            return map_items(cast, value)

        named = {name: value if name.startswith("label") else cast(value) for name, value in kwargs.items()}
        return cast(args), named

    @property
    def _name_of_norm(self) -> str:
        """The method of the engine's optimizer that takes the norm of the gradients."""
        return "_get_norm_groups" if self.shards_weights else "scaled_global_norm"

    def _take_norm_before_step(self, optimizer: Any) -> None:
        """Have the engine's step use the norm that `clip_grad_norm` took, rather than take it again."""
        name = self._name_of_norm
        take = getattr(optimizer, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            norm, self._norm = self._norm, None
            if norm is None:
                return take(*args, **kwargs)
            return [norm] if self.shards_weights else norm

        def combined() -> torch.Tensor:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            taken = take()
            return combine_grad_norm_groups(taken) if self.shards_weights else taken  # type: ignore[no-any-return]

        setattr(optimizer, name, held)
        self._scaled_norm = combined

    def release_model(self) -> None:
        if self._casting is not None:
            self._casting.remove()
        if self.engine is not None:
            self.engine.destroy()
        self.engine = self._optimizer = self._norm = self._casting = None

    # -- a step --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def without_grad_sync(self, model: nn.Module) -> Iterator[None]:
        """Around each micro-batch but the last. With stage 2 and 3 gradients are reduced all the same, into the parts
        that they are summed in."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)  # the loop divided it

    def _backward_of_accelerator(self, loss: torch.Tensor, **kwargs: Any) -> None:
        self.engine.backward(loss, scale_wrt_gas=False, **kwargs)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, optimizer: Optimizer) -> torch.Tensor:
        """The norm of the whole gradient, which the step that follows clips to `max_norm`."""
        wait = getattr(self._optimizer, "_wait_for_offload_copies", None)
        if wait is not None:
            wait()
        scaled = self._norm = self._scaled_norm()
        self._optimizer.clip_grad = float(max_norm)
        norm = scaled / self._optimizer.loss_scale
        # DeepSpeed writes -1 for a norm that is not finite.
        return torch.where(scaled >= 0, norm, torch.full_like(norm, float("nan")))

    def optimizer_step(self, optimizer: Optimizer) -> bool:
        self.engine.step()
        return bool(self.engine.was_step_applied())

    def discard_update(self) -> None:
        """Drop the gradients of an update that is not made."""
        self._norm, inner = None, self._optimizer
        inner.zero_grad(set_to_none=True)
        if getattr(inner, "cpu_offload", False) or getattr(inner, "offload_optimizer", False):
            inner.reset_cpu_buffers()
        for key in list(inner.averaged_gradients):
            inner.averaged_gradients[key] = None
        for key in list(getattr(inner, "all_grad_tensors", {})):
            inner.all_grad_tensors[key] = None
        release = getattr(inner, "_release_preflattened_grad_buffers", None)
        if release is not None:
            release()
        inner.micro_step_id = 0 if self.shards_weights else -1

    @property
    def scales_loss(self) -> bool:
        return bool(self._args.fp16)

    # -- weights -------------------------------------------------------------------------------------------------------

    def unwrap(self, model: nn.Module) -> nn.Module:
        return super().unwrap(getattr(model, "module", model) if model is self.engine else model)

    def whole_weights(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """The state dict of `model` with whole weights, on the host of process 0; empty in the others. None where each
        process has them whole."""
        if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            return None
        whole: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}  # tied weights stay one
        gathered = self._deepspeed.zero.GatheredParameters
        for name, value in model.state_dict(keep_vars=True).items():
            if id(value) not in copies:
                with gathered([value], enabled=hasattr(value, "ds_id")):
                    copies[id(value)] = value.detach().to("cpu", copy=True) if self.process_index == 0 else value
            whole[name] = copies[id(value)]
        return whole if self.process_index == 0 else {}

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Within, each process has all weights whole; what process 0 writes into them stays."""
        parts = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
        with self._deepspeed.zero.GatheredParameters(parts, modifier_rank=0, enabled=bool(parts)):
            yield
        if self._optimizer is not None:  # whose copies in single precision the next step would put back
            self._optimizer.refresh_fp32_params()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_state(self, directory: str, step: int) -> bool:
        deepspeed_checkpoint.save(self.engine, directory, step)
        return True

    def restores_weights(self, checkpoint: str) -> bool:
        return deepspeed_checkpoint.is_there(checkpoint)

    def load_state(self, checkpoint: str) -> bool:
        deepspeed_checkpoint.load(
            self.engine, checkpoint, stage=self.stage, work_dir=str(self._args.output_dir), barrier=self.barrier
        )
        return True


class ConfiguredOptimizer(Optimizer):
    """Holds the parameter groups until the engine builds the optimizer that the configuration names."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("The optimizer of DeepSpeed's configuration is built when training begins.")


def groups_as_built(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups of a `ConfiguredOptimizer` with the rate that they were built with, whatever a schedule made of it."""
    groups = []
    for group in optimizer.param_groups:
        rate = group.get("initial_lr", group["lr"])
        groups.append({**{key: value for key, value in group.items() if key != "initial_lr"}, "lr": rate})
    return groups


def drop_empty_groups(optimizer: Optimizer, scheduler: Any) -> None:
    """DeepSpeed leaves out groups without parameters (no biases are trained, with adapters): the schedule's rates, one
    for each group, must do so, too."""
    groups = optimizer.param_groups
    filled = [index for index, group in enumerate(groups) if group["params"]]
    if len(filled) == len(groups):
        return
    for one in (scheduler, *getattr(scheduler, "_schedulers", ())):
        for name, value in vars(one).items() if one is not None else ():
            is_per_group = isinstance(value, list) and len(value) == len(groups)
            if is_per_group and all(callable(entry) or isinstance(entry, (int, float)) for entry in value):
                setattr(one, name, [value[index] for index in filled])
    groups[:] = [groups[index] for index in filled]


def check_release(engine: Any, optimizer: Any, name_of_norm: str, release: str) -> None:
    """Raise RuntimeError where DeepSpeed lacks a name that is used here: another release may have renamed it."""
    wanted = {engine: _OF_ENGINE, optimizer: (*_OF_OPTIMIZER, name_of_norm)}
    missing = [
        f"{type(one).__name__}.{name}" for one, names in wanted.items() for name in names if not hasattr(one, name)
    ]
    if missing:
        raise RuntimeError(
            f"DeepSpeed {release} has no {', '.join(missing)}, which this Trainer needs to make an update through it. "
            f"Releases {SUPPORTED}.* have it: pip install 'deepspeed=={SUPPORTED}.*'."
        )


# -- before the engine -------------------------------------------------------------------------------------------------


def _become_a_group(args: TrainingArguments) -> None:
    """A process group of one, where no launcher started several: the engine knows nothing else."""
    os.environ.setdefault("LOCAL_RANK", "0")
    kind = args.device.type  # joins the group that a launcher asks for
    if torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        backend=args.ddp_backend or BACKENDS.get(kind, "gloo"),
        store=torch.distributed.HashStore(),  # type: ignore[attr-defined]  # in this process: there is nobody to meet
        rank=0,
        world_size=1,
        timeout=args.ddp_timeout_delta,
    )


def check_age(release: str) -> None:
    """Raise RuntimeError for a release that is too old. A newer one is tried: `check_release`."""
    if tuple(map(int, re.findall(r"\d+", release)[:2])) < tuple(map(int, SUPPORTED.split("."))):
        raise RuntimeError(
            f"DeepSpeed {release} is installed, and this Trainer works with {SUPPORTED} or newer: "
            f"pip install 'deepspeed=={SUPPORTED}.*'."
        )


def _check_accelerator(args: TrainingArguments) -> None:
    from deepspeed.accelerator import get_accelerator

    kind = str(get_accelerator().device_name()).partition(":")[0]
    if kind != args.device.type:
        raise ValueError(
            f"DeepSpeed computes on {kind!r}, and the arguments on {args.device}: it chose when it was imported. Set "
            f"DS_ACCELERATOR={args.device.type} before anything imports deepspeed."
        )


def _tell_accelerate(accelerator: Any, config: dict[str, Any]) -> None:
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    fields = os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # with them accelerate refuses a whole configuration
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=copy.deepcopy(config), zero3_init_flag=False)
    finally:
        if fields is not None:
            os.environ["ACCELERATE_CONFIG_DS_FIELDS"] = fields
    plugin.select(_from_accelerator_state=True)
    state = vars(accelerator.state)
    state["deepspeed_plugins"], state["distributed_type"] = {"default": plugin}, DistributedType.DEEPSPEED


def _be_quiet(args: TrainingArguments) -> None:
    """DeepSpeed reports each part of its start at level INFO, where this package's log level decides; and calls
    collectives by names that torch 2.13 warns of, each time."""
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if args.get_process_log_level() > logging.INFO or args.log_level == "passive":
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def build_root() -> str:
    """Where torch compiles operators."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is not None:
        return root
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    accelerator = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    return os.path.join(cpp_extension.get_default_build_root(), f"{python}_{accelerator}")


def check_build_locks(root: str | None = None, now: float | None = None) -> None:
    """Raise RuntimeError for an operator of DeepSpeed whose build left a lock and is under way no longer.

    A build that is killed leaves it, and every later run waits for it without a word or a limit. Old is what is older
    than three times the slowest build seen, or than a minute where no process works in its directory.
    """
    root = build_root() if root is None else root
    now = time.time() if now is None else now
    if not os.path.isdir(root):
        return
    for name in sorted(os.listdir(root)):
        folder = os.path.join(root, name)
        lock = os.path.join(folder, "lock")
        if os.path.isfile(os.path.join(folder, f"{name}.so")) and not os.path.isfile(lock):
            continue
        try:
            age_s = now - os.stat(lock).st_mtime
        except OSError:
            continue
        if age_s > OLD_LOCK_S or (age_s > YOUNG_LOCK_S and not _works_in(folder)):
            raise RuntimeError(
                f"{lock} is {age_s / 60:.0f} minutes old and nothing builds there: a build of DeepSpeed's operator "
                f"{name!r} was killed, and every run waits for it without end. Delete that file, and start again."
            )


def find_ninja() -> None:
    """Put the `ninja` that came with DeepSpeed on the path: torch compiles with it, and an environment that is not
    activated does not find it."""
    if shutil.which("ninja") is None and is_installed("ninja"):
        import ninja  # type: ignore[import-not-found,unused-ignore]

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


def _works_in(folder: str) -> bool:
    """Whether a process of this machine has `folder` as its working directory, as a compiler has; True where that
    cannot be known, as on another machine."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) != int(os.environ.get("WORLD_SIZE", 1)) or not os.path.isdir("/proc"):
        return True
    target = os.path.realpath(folder)
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.path.realpath(os.path.join("/proc", entry, "cwd")) == target:
                    return True
    return False
