"""LOMO and AdaLomo: the update is fused with the backward pass, so neither gradients nor (LOMO) state are stored.

Owns: building them, clipping, their saved state, and the fused backward pass. Leaves to others: when to run it,
what cannot be combined with it (`fused_backward.py`).
"""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.interop.optional import require
from trainwright.optim.fused_backward import check_in_backward
from trainwright.optim.registry import OptimizerRequest, OptimizerSpec

logger = logging.getLogger(__name__)

# (parameter, key of its hook) of each model's current optimizer. A later one removes these hooks, or both would update.
_HOOKS: weakref.WeakKeyDictionary[nn.Module, list[tuple[Tensor, int]]] = weakref.WeakKeyDictionary()
# AdaLomo's moments: attributes of the optimizer, each a dict by the parameter's name.
_MOMENTS = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")


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
    check_in_backward(request.name, request.args, instead="adafactor")
    if any(parameter.dtype is torch.float16 for parameter in request.model.parameters()):
        raise ValueError(
            f"optim={request.name!r} cannot train weights in float16: the loss scaling of its package fails at the "
            "first overflow. Load the model in bfloat16 or float32."
        )
    kwargs: dict[str, Any] = {"model": request.model} | request.lr
    if request.args.weight_decay:
        kwargs["weight_decay"] = request.args.weight_decay
    max_grad_norm = getattr(request.args, "max_grad_norm", None)
    if max_grad_norm:
        kwargs["clip_grad_norm"] = max_grad_norm
        logger.warning(
            "max_grad_norm=%s costs optim=%r a second backward pass per update, because the norm must be known before "
            "the first weight moves. Set max_grad_norm=0 to do without.",
            max_grad_norm,
            request.name,
        )
    return OptimizerSpec(_for_a_training_loop(getattr(module, class_name)), kwargs)


def _for_a_training_loop(base: Any) -> Any:
    """`base`, a class of lomo_optim, with the interface that a training loop and a checkpoint expect."""

    class InBackward(base):  # type: ignore[misc]
        # `base` is known at run time only, and the options of `optim_args` are read from its signature.
        __signature__ = inspect.signature(base)

        def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            for parameter, key in _HOOKS.pop(model, []):
                (parameter._backward_hooks or {}).pop(key, None)
            before = {id(p): set(p._backward_hooks or ()) for p in model.parameters()}
            super().__init__(model, *args, **kwargs)
            _HOOKS[model] = [
                (p, key) for p in model.parameters() for key in set(p._backward_hooks or ()) - before[id(p)]
            ]

        def step(self, *args: Any, **kwargs: Any) -> None:
            """No-op: the parameters were updated during the backward pass."""

        def zero_grad(self, set_to_none: bool = True) -> None:
            """No-op: each gradient was freed after its use."""

        def state_dict(self) -> dict[str, Any]:
            """The usual shape; the package omits AdaLomo's moments, and a resume would lose them."""
            saved: dict[str, Any] = super().state_dict()
            for number, (name, _) in enumerate(self.model.named_parameters()):
                moments = {moment: getattr(self, moment, {})[name] for moment in self._moments_of(name)}
                if moments:
                    saved["state"][number] = moments | {"step": self.step_num}
            return saved

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict({**state_dict, "state": {}})
            for number, (name, _) in enumerate(self.model.named_parameters()):
                saved = state_dict["state"].get(number, {})
                for moment in self._moments_of(name):
                    getattr(self, moment)[name].copy_(saved[moment])
                    self.step_num = saved["step"]

        def _moments_of(self, name: str) -> list[str]:
            return [moment for moment in _MOMENTS if name in getattr(self, moment, {})]

    InBackward.__name__ = InBackward.__qualname__ = base.__name__
    return InBackward


def fused_backward(optimizer: Any, loss: Tensor) -> None:
    """The backward pass of `loss`, updating each parameter when its gradient is computed, at the scheduled rate.

    With clipping, a first pass measures the norm of all gradients.
    """
    if optimizer.clip_grad_norm:
        optimizer.grad_norm(loss)
    optimizer.fused_backward(loss, optimizer.param_groups[0]["lr"])


def gradient_norm(optimizer: Any) -> Tensor:
    """The norm that the last `fused_backward` measured, before clipping."""
    norms: Tensor = torch.as_tensor(optimizer.grad_norms)
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm
