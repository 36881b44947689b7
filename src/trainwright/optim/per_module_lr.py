"""Learning rates per module: `learning_rate_per_module={"classifier": 1e-3}`.

Owns: which parameters a pattern means, splitting parameter groups by it, and the check that an optimizer uses it.
Leaves
to others: the documented groups (`groups.py`), the schedule, which scales every group's rate by the same factor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainwright.names import closest

_ARGUMENT = "learning_rate_per_module"


def with_module_lr(groups: list[dict[str, Any]], model: nn.Module, rates: Any) -> list[dict[str, Any]]:
    """`groups`, followed by one group per pattern and group in which it matches parameters, with its "lr".

    `rates` is a dict from patterns to learning rates, or None. Other settings of a group (weight decay, GaLore's ...)
    are copied. Errors as `pattern_of_parameters`.
    """
    if not rates:
        return groups
    owner = pattern_of_parameters(model, rates)
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in owner]} for group in groups]
    split = [
        {**group, "params": chosen, "lr": rate}
        for pattern, rate in rates.items()
        for group in groups
        if (chosen := [p for p in group["params"] if owner.get(id(p)) == pattern])
    ]
    return rest + split


def pattern_of_parameters(model: nn.Module, patterns: Iterable[str]) -> dict[int, str]:
    """The pattern that applies to each parameter, by the parameter's `id`; parameters that none matches are left out.

    A pattern is a regular expression for the whole name of a parameter or of a module, with everything in it. Of
    several that match, the last one applies. Raises ValueError on one that is no regular expression, or that applies to
    no trainable parameter.
    """
    owner: dict[int, str] = {}
    matched: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in patterns}
    for pattern, members in matched.items():
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{_ARGUMENT}: {pattern!r} is not a regular expression ({error}).") from error
        for name, parameter in model.named_parameters(remove_duplicate=False):  # tied weights have several names
            if any(expression.fullmatch(candidate) for candidate in _enclosing(name)):
                members.append(parameter)
                if parameter.requires_grad:
                    owner[id(parameter)] = pattern
    deciding = set(owner.values())
    for pattern, members in matched.items():
        if pattern not in deciding:
            raise ValueError(f"{_ARGUMENT}: {pattern!r} {_why_without_effect(model, pattern, members)}")
    return owner


def _enclosing(name: str) -> list[str]:
    """The name and those of its enclosing modules: "a.b.weight" to ["a", "a.b", "a.b.weight"]."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _why_without_effect(model: nn.Module, pattern: str, members: list[nn.Parameter]) -> str:
    if any(parameter.requires_grad for parameter in members):
        return "has no effect: later patterns decide over all it matches. Put it behind them, or leave it out."
    if members:
        return "matches frozen parameters only. Set requires_grad=True on them, or leave it out."
    modules = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    names = dict.fromkeys([*modules, *(name for name, _ in model.named_parameters())])
    ends = [name for name in names if name.rpartition(".")[2] == pattern or name.endswith(f".{pattern}")]
    likely = f" Did you mean {ends[0]!r}?" if ends else closest(pattern, names)
    shown = [name for name in modules if "." not in name][:12]
    return (
        f"matches no parameter. A pattern is a regular expression for the whole name of a module or parameter; the "
        f"model consists of {shown}.{likely}"
    )


def check_module_lr(optimizer: Optimizer, model: nn.Module, rates: Any) -> None:
    """Raise ValueError where `optimizer` does not train a matched parameter at the rate that `rates` gives it."""
    if not rates:
        return
    owner = pattern_of_parameters(model, rates)
    for group in optimizer.param_groups:
        start = float(group.get("initial_lr", group["lr"]))  # a schedule has already set the rate of the first step
        for parameter in group["params"]:
            pattern = owner.get(id(parameter))
            # A rate stored as a float32 tensor (torchao) is rounded.
            if pattern is not None and abs(start - rates[pattern]) > 1e-6 * abs(rates[pattern]):
                raise ValueError(
                    f"{_ARGUMENT} gives {pattern!r} the learning rate {rates[pattern]}, but the optimizer "
                    f"({type(optimizer).__name__}) trains it at {start}: it was built with other groups, or supports "
                    "one rate only. Give the groups their rates where it is built, or choose another optim."
                )
