"""`optimizer_in_backward`: each parameter is updated as soon as its gradient is there, and the gradient is freed.

Owns: it for any optimizer whose update of one parameter depends on no other. Leaves to others: arguments that exclude
it (`args/precision.py`), optimizers that do so by themselves (`optim/fused_backward.py`), when (Trainer).

The gradients of a model never exist all at once: the peak is that of the largest parameter. The optimizer remains one
object with its groups and state, so a checkpoint is that of an ordinary run, and either resumes the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainwright.optim.combined import CombinedOptimizer
from trainwright.optim.fused_backward import updates_in_backward

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments


def start(optimizer: Optimizer, model: nn.Module, args: TrainingArguments, obstacle: str | None) -> InBackward:
    """Start for a run; errors as `InBackward`. `obstacle`: why gradients are incomplete when a hook is called."""
    args._check_optimizer_in_backward()  # again, since a trial of a search may have changed the arguments
    if obstacle is not None:
        raise ValueError(
            f"optimizer_in_backward=True works in one process on one device; with {obstacle} a gradient is not "
            "complete when it first appears. Leave it out."
        )
    check_model(model, optimizer)
    return InBackward(optimizer)


class InBackward:
    """Steps `optimizer` from the backward pass, one parameter at a time, until it is closed.

    Raises ValueError for an optimizer that does not support it: one made of several, one that updates in the backward
    pass already, and, at the first update, one that stores numbers of the whole step in its groups (schedule-free).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if updates_in_backward(optimizer):
            raise ValueError(
                f"optimizer_in_backward=True with {name}, which updates in the backward pass already: leave it out."
            )
        if isinstance(optimizer, CombinedOptimizer):
            raise ValueError(
                f"optimizer_in_backward=True needs one optimizer, and {name} is made of several: choose another optim."
            )
        self._optimizer = optimizer
        # torch's optimizers read a parameter's group and nothing else, so they get a group of that one parameter.
        # Others may depend on positions in their groups, and find the one parameter with a gradient.
        self._shows_one = type(optimizer).__module__.startswith(("torch.optim.", "trainwright.optim."))
        self._checked: set[int] = set()
        self._handles = []
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad:
                    hook = self._hook_for(index)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook_for(self, index: int) -> Any:
        def update(parameter: torch.Tensor) -> None:
            groups = self._optimizer.param_groups
            group = groups[index]
            shown = {**group, "params": [parameter]} if self._shows_one else group
            if index not in self._checked:
                before = {name: value for name, value in shown.items() if name != "params"}
            if self._shows_one:
                self._optimizer.param_groups = [shown]
            try:
                self._optimizer.step()
            finally:
                self._optimizer.param_groups = groups
                parameter.grad = None
            if index not in self._checked:
                self._checked.add(index)
                self._check_unchanged(before, shown)

        return update

    def _check_unchanged(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        changed = [name for name in after if name != "params" and not _same(after[name], before.get(name))]
        if changed:
            raise ValueError(
                f"optimizer_in_backward=True cannot work with {type(self._optimizer).__name__}: it keeps {changed} of "
                "the whole step in its parameter groups, which would change with every parameter. Choose another "
                "optim, or leave optimizer_in_backward out."
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    return bool(one == other)


def check_model(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise ValueError where a trainable parameter of `model` is not in `optimizer`: its gradient would stay."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    if left:
        raise ValueError(
            f"optimizer_in_backward=True: the optimizer does not hold {left[:3]}, whose gradients would not be freed. "
            "Freeze them with requires_grad_(False), or give them to the optimizer."
        )
