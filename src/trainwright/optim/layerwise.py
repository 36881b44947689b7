"""Several optimizers behind one: each parameter updated on its own as soon as its gradient is there.

Owns: `CompositeOptimizer` (shared groups, one `state_dict`) and the layer-wise optimizer built on it. Leaves
to others: which optimizer each parameter gets (`low_rank.py`, `muon.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class CompositeOptimizer(Optimizer):
    """Optimizers that act as one.

    Its `param_groups` are the very dicts of the optimizers inside, so a schedule reaches them; its `state_dict()` has
    the ordinary shape, each optimizer inside writing and reading its own part.
    """

    def __init__(self, optimizers: Sequence[Optimizer], defaults: dict[str, Any]) -> None:
        self.optimizers = list(optimizers)
        super().__init__(self._groups_inside(), defaults)

    def _groups_inside(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of every parameter, gathered."""
        return defaultdict(dict, {key: value for inner in self.optimizers for key, value in inner.state.items()})

    @state.setter
    def state(self, value: Any) -> None:
        """The base class sets an empty state; the optimizers inside hold theirs."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every optimizer; returns what `closure` returned, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State by the position of the parameter, and groups, as every optimizer of torch writes them."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for optimizer in self.optimizers:
            part = optimizer.state_dict()
            state |= {first + number: value for number, value in part["state"].items()}
            groups += [{**g, "params": [first + number for number in g["params"]]} for g in part["param_groups"]]
            first += sum(len(group["params"]) for group in part["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give every optimizer its part. Each loads it itself, because some keep state that must not be cast."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"The saved optimizer has {len(groups)} parameter groups, this one has {len(self.param_groups)}."
            )
        first = 0
        for optimizer in self.optimizers:
            last = first + len(optimizer.param_groups)
            own = {number for group in groups[first:last] for number in group["params"]}
            state = {number: value for number, value in state_dict["state"].items() if number in own}
            optimizer.load_state_dict({"state": state, "param_groups": groups[first:last]})
            first = last
        self.param_groups = self._groups_inside()  # loading replaced the dicts


class LayerWiseDummyOptimizer(CompositeOptimizer):
    """What training steps when every parameter has an optimizer of its own.

    Each parameter is updated, and its gradient freed, while the backward pass is still under way, so the gradients
    never exist all at once. `step()` and `zero_grad()` therefore have nothing left to do. Clipping and accumulation
    would need all gradients and cannot work. Without `optimizer_dict` it holds one unused parameter.
    """

    def __init__(
        self, optimizer_dict: Mapping[nn.Parameter, Optimizer] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        self.optimizer_dict = dict(optimizer_dict or {})
        lr = kwargs.get("lr", 1e-3)
        unused = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        super().__init__(list(self.optimizer_dict.values()) or [unused], {"lr": lr})
        for parameter in self.optimizer_dict:
            parameter.register_post_accumulate_grad_hook(self._step_parameter)  # type: ignore[no-untyped-call]

    def _step_parameter(self, parameter: Tensor) -> None:
        optimizer = self.optimizer_dict[parameter]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Nothing: the parameters were updated during the backward pass."""
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: each gradient was freed when it was used."""


class LayerWiseDummyScheduler(LRScheduler):
    """A schedule that leaves every learning rate as it is.

    Kept for scripts that name it. Trainwright needs none: a schedule built over a `LayerWiseDummyOptimizer` reaches the
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
