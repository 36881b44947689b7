"""Optimizers by name: `optim="adamw_torch"` to a class and its arguments.

Owns: the table of names, what each needs to run, and registering more. Leaves to others: building the optimizer
(`build.py`), what each family passes on (`*_family.py`, `low_rank.py`, `lomo.py`, `third_party.py`). Nothing of a
family is imported before one of its optimizers is chosen.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from trainwright.names import OptimizerNames, closest
from trainwright.optim.options import parse_optim_args, typed, with_options

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T", bound=Callable[..., Any])


@dataclass
class OptimizerSpec:
    """What a builder returns: called as `cls(groups, **kwargs)`.

    `kwargs` may hold "params" (groups), "model" or "optimizer_dict"; see `build_optimizer`.
    """

    cls: Callable[..., Any]
    kwargs: dict[str, Any]


@dataclass
class OptimizerRequest:
    """The input of a builder. `options` holds unused `optim_args`; what a builder leaves there goes to the class."""

    name: str
    args: Any  # TrainingArguments, or anything with the same fields
    model: nn.Module | None = None
    options: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, default: Any) -> Any:
        """Remove and return the option `name`, typed like `default`; `default` where it is not given."""
        return typed(name, self.options.pop(name), default) if name in self.options else default

    @property
    def lr(self) -> dict[str, Any]:
        return {"lr": self.args.learning_rate}

    @property
    def betas(self) -> dict[str, Any]:
        return {"betas": (self.args.adam_beta1, self.args.adam_beta2)}

    @property
    def eps(self) -> dict[str, Any]:
        return {"eps": self.args.adam_epsilon}

    @property
    def per_module_lr(self) -> dict[str, float] | None:
        """`learning_rate_per_module`: a builder that makes "params" splits them with `with_module_lr`."""
        rates: dict[str, float] | None = getattr(self.args, "learning_rate_per_module", None)
        return rates

    @property
    def adam(self) -> dict[str, Any]:
        """The arguments that every Adam takes from the run."""
        return self.lr | self.betas | self.eps


@dataclass(frozen=True)
class Row:
    """One name: where its builder is, what it needs, and when to use it."""

    builder: str | Callable[[OptimizerRequest], OptimizerSpec]  # "module:function", imported on use
    use: str
    package: str | None = None  # to install
    device: str | None = None  # where alone it runs
    # Whether it steps parameters of which each process has a part as it steps whole ones, also after a resume.
    # Measured by tests/distributed/test_sharded_optimizers.py, and in training by test_fsdp_optimizers.py.
    sharded: bool = False


_FAMILY = "trainwright.optim."
_TORCH = _FAMILY + "torch_family:"
_BNB = _FAMILY + "bitsandbytes_family:build"
_AO = _FAMILY + "torchao_family:build"
_LOW_RANK = _FAMILY + "low_rank:"
_LOMO = _FAMILY + "lomo:"
_THIRD_PARTY = _FAMILY + "third_party:"

ROWS: dict[str, Row] = {
    "adamw_torch": Row(_TORCH + "adamw", "AdamW of torch, step by step: where no fused kernel exists", sharded=True),
    "adamw_torch_fused": Row(_TORCH + "adamw_fused", "the default: the same in one kernel", sharded=True),
    "adamw_torch_xla": Row(_TORCH + "adamw_xla", "TPUs: AdamW that does not wait for the device", "torch_xla", "xla"),
    "adamw_torch_npu_fused": Row(_TORCH + "adamw_npu", "Ascend NPUs: AdamW in one kernel", "torch_npu", "npu"),
    "adamw_apex_fused": Row(_THIRD_PARTY + "apex", "scripts that name it", "apex", "cuda"),
    "adafactor": Row(_TORCH + "adafactor", "large models in little memory: one row and column per matrix"),
    "adamw_anyprecision": Row(
        _THIRD_PARTY + "any_precision", "pure bfloat16 training with compensated rounding", sharded=True
    ),
    "adamw_torch_4bit": Row(_AO, "AdamW with a 4-bit state", "torchao"),
    "adamw_torch_8bit": Row(_AO, "AdamW with an 8-bit state", "torchao"),
    "ademamix": Row(_BNB, "AdamW with a second, slower momentum", "bitsandbytes"),
    "sgd": Row(_TORCH + "sgd", "the least memory: no state without momentum", sharded=True),
    "adagrad": Row(_TORCH + "adagrad", "sparse features", sharded=True),
    "adamw_bnb_8bit": Row(_BNB, "AdamW with an 8-bit state", "bitsandbytes"),
    "adamw_8bit": Row(_BNB, "another name of adamw_bnb_8bit", "bitsandbytes"),
    "ademamix_8bit": Row(_BNB, "AdEMAMix with an 8-bit state", "bitsandbytes"),
    "lion_8bit": Row(_BNB, "Lion with an 8-bit state: one moment instead of two", "bitsandbytes"),
    "lion_32bit": Row(_BNB, "Lion: one moment instead of two", "bitsandbytes"),
    "paged_adamw_32bit": Row(_BNB, "AdamW whose state moves to the host when the GPU is full", "bitsandbytes"),
    "paged_adamw_8bit": Row(_BNB, "the same with an 8-bit state", "bitsandbytes"),
    "paged_ademamix_32bit": Row(_BNB, "AdEMAMix with a paged state", "bitsandbytes"),
    "paged_ademamix_8bit": Row(_BNB, "AdEMAMix with a paged 8-bit state", "bitsandbytes"),
    "paged_lion_32bit": Row(_BNB, "Lion with a paged state", "bitsandbytes"),
    "paged_lion_8bit": Row(_BNB, "Lion with a paged 8-bit state", "bitsandbytes"),
    "rmsprop": Row(_TORCH + "rmsprop", "recurrent networks; the second moment without the first", sharded=True),
    "rmsprop_bnb": Row(_BNB, "RMSprop of bitsandbytes", "bitsandbytes"),
    "rmsprop_bnb_8bit": Row(_BNB, "RMSprop with an 8-bit state", "bitsandbytes"),
    "rmsprop_bnb_32bit": Row(_BNB, "another name of rmsprop_bnb", "bitsandbytes"),
    "galore_adamw": Row(_LOW_RANK + "galore", "full training with a low-rank optimizer state", "galore-torch"),
    "galore_adamw_8bit": Row(_LOW_RANK + "galore", "the same with an 8-bit state", "galore-torch", "cuda"),
    "galore_adafactor": Row(_LOW_RANK + "galore", "GaLore on Adafactor", "galore-torch"),
    "galore_adamw_layerwise": Row(_LOW_RANK + "galore", "GaLore, one layer's gradient at a time", "galore-torch"),
    "galore_adamw_8bit_layerwise": Row(_LOW_RANK + "galore", "the same with an 8-bit state", "galore-torch", "cuda"),
    "galore_adafactor_layerwise": Row(_LOW_RANK + "galore", "GaLore on Adafactor, layer by layer", "galore-torch"),
    "lomo": Row(_LOMO + "lomo", "fused with the backward pass: no gradients, no state", "lomo-optim"),
    "adalomo": Row(_LOMO + "adalomo", "LOMO with a factored second moment", "lomo-optim", "cuda"),
    "grokadamw": Row(_THIRD_PARTY + "grokadamw", "tasks where generalisation comes late", "grokadamw", sharded=True),
    "schedule_free_radam": Row(
        _THIRD_PARTY + "schedule_free", "no schedule and no warmup to choose", "schedulefree", sharded=True
    ),
    "schedule_free_adamw": Row(_THIRD_PARTY + "schedule_free", "no schedule to choose", "schedulefree", sharded=True),
    "schedule_free_sgd": Row(
        _THIRD_PARTY + "schedule_free", "no schedule to choose, SGD", "schedulefree", sharded=True
    ),
    "apollo_adamw": Row(_LOW_RANK + "apollo", "AdamW scaled by a low-rank state", "apollo-torch"),
    "apollo_adamw_layerwise": Row(_LOW_RANK + "apollo", "the same, one layer's gradient at a time", "apollo-torch"),
    "stable_adamw": Row(
        _THIRD_PARTY + "stable_adamw",
        "AdamW with clipped updates instead of clipped gradients",
        "torch-optimi",
        sharded=True,
    ),
    "muon": Row(_TORCH + "muon", "pre-training: hidden matrices by Muon, the rest by AdamW", sharded=True),
}


def is_registered(name: object) -> bool:
    """Whether `optim=name` is known beyond `OptimizerNames`: added by `register_optimizer`, or by this package."""
    return isinstance(name, str) and name in ROWS and name not in {member.value for member in OptimizerNames}


def register_optimizer(name: str) -> Callable[[T], T]:
    """Register a class, or a function that builds an optimizer, as `optim=name`.

    @register_optimizer("my_adam")
    class MyAdam(torch.optim.Optimizer): ...  # called with the parameter groups, lr, and the options of optim_args

    @register_optimizer("my_other_adam")
    def build(request: OptimizerRequest) -> OptimizerSpec: ...

    Registering the same class or function again (a notebook cell that runs twice) replaces it. Raises ValueError for a
    name that exists or could not be written on a command line, TypeError for what is neither a class nor a function.
    """
    if not isinstance(name, str):
        raise TypeError(f"register_optimizer takes a name first, not {name!r}: write @register_optimizer('my_adam').")
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
        raise ValueError(f"register_optimizer({name!r}): a name must be letters, digits, '_', '-' and '.'.")

    def keep(target: T) -> T:
        if not callable(target):
            raise TypeError(f"register_optimizer({name!r}) needs a class or a function; got {target!r}.")
        identity = (target.__module__, getattr(target, "__qualname__", repr(target)))
        if name in ROWS and _REGISTERED.get(name) != identity:
            raise ValueError(f"An optimizer called {name!r} exists already; choose another name.")
        builder = _class_builder(target) if isinstance(target, type) else target
        ROWS[name] = Row(builder, (target.__doc__ or "").partition("\n")[0], sharded=True)  # as far as is known
        _REGISTERED[name] = identity
        return target

    if name in ROWS and name not in _REGISTERED:
        raise ValueError(f"An optimizer called {name!r} exists already; choose another name.")
    return keep


_REGISTERED: dict[str, tuple[str, str]] = {}  # module and qualified name of each target of register_optimizer


def unknown_optimizer(name: object) -> ValueError:
    """The error about an unknown `optim`."""
    hint = closest(str(name), ROWS) or " Your own are known once the module that calls register_optimizer is imported."
    return ValueError(f"optim={name!r} is not a known optimizer; choose one of {sorted(ROWS)}.{hint}")


def _class_builder(cls: Any) -> Callable[[OptimizerRequest], OptimizerSpec]:
    def build(request: OptimizerRequest) -> OptimizerSpec:
        return OptimizerSpec(cls, request.lr)

    return build


def optimizer_class_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class that `args.optim` names and the arguments that `args` and `args.optim_args` give it, "lr" among them.

    `model` is needed by optimizers that choose their own parameters (GaLore, APOLLO, LOMO, Muon). Errors: ValueError on
    an unknown name or option, MissingExtra where a package is absent. No device is needed (`check_device`).
    """
    name = args.optim.value if isinstance(args.optim, Enum) else str(args.optim)
    if name not in ROWS:
        raise unknown_optimizer(name)
    row = ROWS[name]
    builder = row.builder
    if isinstance(builder, str):
        module, _, function = builder.partition(":")
        builder = getattr(importlib.import_module(module), function)
    request = OptimizerRequest(name, args, model, parse_optim_args(getattr(args, "optim_args", None)))
    spec = builder(request)
    if not isinstance(spec, OptimizerSpec):
        raise TypeError(f"The builder of optim={name!r} must return an OptimizerSpec(cls, kwargs); it gave {spec!r}.")
    return spec.cls, with_options(spec.cls, spec.kwargs, request.options, name)


def check_sharded(args: Any, engine: str) -> None:
    """Raise ValueError where the optimizer that `args.optim` names cannot step the shards of `engine`."""
    name = args.optim.value if isinstance(args.optim, Enum) else str(args.optim)
    if name in ROWS and not ROWS[name].sharded:
        able = sorted(other for other, row in ROWS.items() if row.sharded)
        raise ValueError(
            f"optim={name!r} cannot be used with {engine}: it does not step parameters of which each process has a "
            f"part. Those that do are {able}."
        )


_PACKAGES_NOT_SHARDED = ("bitsandbytes", "torchao", "galore_torch", "apollo_torch", "lomo_optim")


def check_sharded_class(cls: type, engine: str) -> None:
    """Raise ValueError for the class of a given optimizer that is known, from the rows above, not to step the shards of
    `engine`; any other is used as is.
    """
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in _PACKAGES_NOT_SHARDED or base.__name__ == "Adafactor":
            raise ValueError(
                f"{cls.__module__}.{cls.__qualname__} cannot be used with {engine}: it does not step parameters of "
                "which each process has a part. Pass torch.optim.AdamW or another that treats each number alone, or "
                "leave it out and set optim."
            )


def check_device(args: Any) -> None:
    """Raise RuntimeError where the optimizer that `args.optim` names cannot run on this machine."""
    name = args.optim.value if isinstance(args.optim, Enum) else str(args.optim)
    if name not in ROWS or ROWS[name].device != "cuda":
        return  # the packages of the other devices do not even import elsewhere
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"optim={name!r} runs on CUDA devices only, and none is visible here. Use a machine with one, "
            'or choose another optimizer, for instance optim="adamw_torch".'
        )
