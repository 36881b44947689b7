"""Several optimizers as one object, for a training loop, a schedule and a checkpoint.

Owns: `CombinedOptimizer`. Leaves to others: which optimizer gets which parameter (`muon.py`, `layerwise.py`, users).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class CombinedOptimizer(Optimizer):
    """`CombinedOptimizer([Muon(matrices, lr=0.02), AdamW(others, lr=3e-4)])`: one optimizer that steps all of them.

    Its `param_groups` are the dicts of the inner optimizers, so one schedule scales every learning rate by the
    same factor; its `state_dict()` has the usual shape, each inner optimizer writing and reading its part. The
    order of `optimizers` is part of a saved state. Where a schedule needs one base rate (`min_lr`, `lr_end`), it is
    that of the first optimizer, or of `defaults`.

    Raises:
        TypeError: an entry is not a `torch.optim.Optimizer`.
        ValueError: there is no entry, two share a parameter, or one updates during the backward pass.
    """

    _is_built = False

    def __init__(self, optimizers: Sequence[Optimizer], defaults: dict[str, Any] | None = None) -> None:
        self.optimizers = list(optimizers)
        self._check()
        super().__init__(self._groups_inside(), dict(self.optimizers[0].defaults if defaults is None else defaults))
        self._is_built = True

    def _check(self) -> None:
        from trainwright.optim.fused_backward import updates_in_backward

        if not self.optimizers:
            raise ValueError("CombinedOptimizer needs at least one optimizer; optimizers is empty.")
        for optimizer in self.optimizers:
            if not isinstance(optimizer, Optimizer):
                given = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else repr(optimizer)
                raise TypeError(f"optimizers holds {given}; each entry must be a torch.optim.Optimizer.")
            if updates_in_backward(optimizer):
                raise ValueError(
                    f"{type(optimizer).__name__} updates weights during the backward pass, so it cannot be combined "
                    "with others."
                )
        owners: dict[int, Optimizer] = {}
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                owner = owners.setdefault(id(parameter), optimizer)
                if owner is not optimizer:
                    raise ValueError(
                        f"A parameter of shape {tuple(parameter.shape)} is in two of the optimizers "
                        f"({type(owner).__name__} and {type(optimizer).__name__}): give it to one of them."
                    )

    def _groups_inside(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of every parameter, gathered."""
        return defaultdict(dict, {key: value for inner in self.optimizers for key, value in inner.state.items()})

    @state.setter
    def state(self, value: Any) -> None:
        """The base class sets an empty state; the inner optimizers hold theirs."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every optimizer; returns what `closure` returned, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def train(self) -> None:
        """Switch schedule-free optimizers to the weights they train."""
        self._switch("train")

    def eval(self) -> None:
        """Switch schedule-free optimizers to the weights to evaluate and save."""
        self._switch("eval")

    def _switch(self, name: str) -> None:
        for optimizer in self.optimizers:
            switch = getattr(optimizer, name, None)
            if callable(switch):
                switch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once it is built: an inner optimizer must step the group, and only the caller knows which."""
        if self._is_built:
            raise ValueError(
                "A CombinedOptimizer takes no further parameter group: no inner optimizer would step it. Add the group "
                "to one of the optimizers first, then combine them."
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """State by the position of the parameter, and groups, as every optimizer of torch writes them."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        written = self._state_dict_inside()
        for after in self._optimizer_state_dict_post_hooks.values():
            written = _or_else(after(self, written), written)
        return written

    def _state_dict_inside(self) -> dict[str, Any]:
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
        """Split the state among the inner optimizers. Each loads its part itself, since some state must not be cast."""
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _or_else(before(self, state_dict), state_dict)
        self._load_inside(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load_inside(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"The saved optimizer has {len(groups)} parameter groups, this one has {len(self.param_groups)}."
            )
        first = 0
        for optimizer in self.optimizers:
            last = first + len(optimizer.param_groups)
            numbers = {number for group in groups[first:last] for number in group["params"]}
            state = {number: value for number, value in state_dict["state"].items() if number in numbers}
            optimizer.load_state_dict({"state": state, "param_groups": groups[first:last]})
            first = last
        self.param_groups = self._groups_inside()  # loading replaced the dicts


def _or_else(result: dict[str, Any] | None, otherwise: dict[str, Any]) -> dict[str, Any]:
    """What a hook returned, or its input where it returned None."""
    return otherwise if result is None else result
