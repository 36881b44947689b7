"""LOMO and AdaLomo: the update is part of the backward pass, so neither gradients nor state are kept.

Owns: building them and running such a backward pass. Leaves to others: when to run it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainwright.interop.loaded import is_instance_of
from trainwright.interop.optional import require
from trainwright.optim.registry import OptimizerRequest, OptimizerSpec


def lomo(request: OptimizerRequest) -> OptimizerSpec:
    return _build(request, "Lomo")


def adalomo(request: OptimizerRequest) -> OptimizerSpec:
    return _build(request, "AdaLomo")


def _build(request: OptimizerRequest, class_name: str) -> OptimizerSpec:
    module = require("lomo_optim", f"optim={request.name!r}", extra="lomo")
    if request.model is None:
        raise ValueError(
            f"optim={request.name!r} hooks into the model's backward pass, so it needs the model; model is None."
        )
    kwargs: dict[str, Any] = {"model": request.model} | request.lr
    if request.args.weight_decay:
        kwargs["weight_decay"] = request.args.weight_decay
    return OptimizerSpec(_with_nothing_left_to_step(getattr(module, class_name)), kwargs)


def _with_nothing_left_to_step(cls: type) -> type:
    # The package leaves step() unimplemented; here a training loop may call it as it does with every optimizer.
    return type(cls.__name__, (cls,), {"step": _nothing, "zero_grad": _nothing, "__module__": cls.__module__})


def _nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    """Nothing: the parameters were updated during the backward pass."""


def is_lomo(optimizer: Any) -> bool:
    """Whether `optimizer` updates during the backward pass and so takes the place of `loss.backward()`."""
    return is_instance_of(optimizer, "lomo_optim", "Lomo", "AdaLomo")


def fused_backward(optimizer: Any, loss: Tensor) -> None:
    """The backward pass of `loss`, updating each parameter as its gradient appears, at the scheduled learning rate."""
    optimizer.fused_backward(loss, optimizer.param_groups[0]["lr"])
