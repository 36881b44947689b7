"""One optimizer per parameter, stepped as soon as the parameter's gradient is there.

Owns: the layer-wise optimizer and its companion schedule. Leaves to others: combining them (`combined.py`), which
optimizer each parameter gets (`low_rank.py`), what such an optimizer excludes (`fused_backward.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.weak import WeakTensorKeyDictionary

from trainwright.optim.combined import CombinedOptimizer

# The hook that steps each parameter. A later optimizer removes it: with both hooks every parameter would be updated
# twice.
_HOOKS: Any = WeakTensorKeyDictionary()


class LayerWiseDummyOptimizer(CombinedOptimizer):
    """The optimizer object of a run in which every parameter has a separate optimizer.

    Each parameter is updated, and its gradient freed, during the backward pass, so the gradients never exist all at
    once. `step()` and `zero_grad()` are therefore no-ops. Clipping and accumulation would need all gradients and cannot
    work. Without `optimizer_dict` it holds one unused parameter.
    """

    updates_in_backward = True

    def __init__(
        self, optimizer_dict: Mapping[nn.Parameter, Optimizer] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        self.optimizer_dict = dict(optimizer_dict or {})
        lr = kwargs.get("lr", 1e-3)
        unused = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        super().__init__(list(self.optimizer_dict.values()) or [unused], {"lr": lr})
        for parameter in self.optimizer_dict:
            if parameter in _HOOKS:
                _HOOKS[parameter].remove()
            hook = parameter.register_post_accumulate_grad_hook(self._step_parameter)  # type: ignore[no-untyped-call]
            _HOOKS[parameter] = hook

    def _step_parameter(self, parameter: Tensor) -> None:
        optimizer = self.optimizer_dict[parameter]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """No-op: the parameters were updated during the backward pass."""
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """No-op: each gradient was freed after its use."""


class LayerWiseDummyScheduler(LRScheduler):
    """A schedule that changes no learning rate.

    For scripts that name it. Trainwright needs none: a schedule built over a `LayerWiseDummyOptimizer` reaches the
    optimizer of each parameter.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        optimizer = LayerWiseDummyOptimizer(lr=kwargs.get("lr", 1e-3))
        for inner in (kwargs.get("optimizer_dict") or {}).values():
            optimizer.param_groups += inner.param_groups
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The learning rates as they are."""
        return [group["lr"] for group in self.optimizer.param_groups]
