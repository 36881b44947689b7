"""Parameter groups: which parameters are trained, which of them decay, and queries about an optimizer's groups.

Owns: the two documented parameter groups, the rule that sorts parameters into them, name matching, counting.
Leaves to others: which optimizer gets the groups (`registry.py`, `build.py`).

The order of parameters is part of the interface: an optimizer's saved state refers to parameters by position.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

FORBIDDEN_LAYER_TYPES: tuple[type[nn.Module], ...] = (nn.LayerNorm,)
# Searched in the lower-cased name: anything called a bias, and norms, which are recognised by name because libraries
# define their own classes for them.
FORBIDDEN_NAME_PATTERNS = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def get_parameter_names(
    model: nn.Module,
    forbidden_layer_types: Iterable[type[nn.Module]],
    forbidden_layer_names: Sequence[str] | None = None,
) -> list[str]:
    """Names of the parameters outside `forbidden_layer_types` that match none of the regular expressions.

    Patterns are searched in the lower-cased name as seen from each enclosing module. A parameter shared by several
    modules is listed under each of its names.
    """
    types = tuple(forbidden_layer_types)
    patterns = [re.compile(pattern) for pattern in forbidden_layer_names or ()]
    return _allowed_names(model, types, patterns)


def _allowed_names(
    module: nn.Module, types: tuple[type[nn.Module], ...], patterns: Sequence[re.Pattern[str]]
) -> list[str]:
    names = [
        f"{child_name}.{name}"
        for child_name, child in module.named_children()
        if not isinstance(child, types)
        for name in _allowed_names(child, types, patterns)
    ]
    names += module._parameters
    return [name for name in names if not any(pattern.search(name.lower()) for pattern in patterns)]


def decay_parameter_names(
    model: nn.Module,
    forbidden_layer_types: Iterable[type[nn.Module]] = FORBIDDEN_LAYER_TYPES,
    forbidden_name_patterns: Sequence[str] = FORBIDDEN_NAME_PATTERNS,
) -> list[str]:
    """Names of the parameters that weight decay applies to: all but biases and norms."""
    return get_parameter_names(model, forbidden_layer_types, forbidden_name_patterns)


def parameter_groups(model: nn.Module, weight_decay: float, decay_names: Iterable[str]) -> list[dict[str, Any]]:
    """The two documented groups, decaying parameters first; each may be empty, so that saved states always fit.

    Only parameters that require a gradient take part, in the order of `model.named_parameters()`.
    """
    decaying = set(decay_names)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if name in decaying], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trained if name not in decaying], "weight_decay": 0.0},
    ]


def _existing(optimizer: Optimizer | None) -> Optimizer:
    if optimizer is None:
        raise ValueError("There is no optimizer yet: call create_optimizer() or train() first.")
    return optimizer


def optimizer_group(optimizer: Optimizer | None, param: str | Parameter | None = None) -> Any:
    """The group that holds `param`; without `param`, the list of every group's parameters.

    A name is found where the optimizer was built from named parameters. ValueError where no group holds `param`, or
    there is no optimizer.
    """
    optimizer = _existing(optimizer)
    if param is None:
        return [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if isinstance(param, str):
            if param in group.get("param_names", ()):
                return group
        elif any(member is param for member in group["params"]):  # `in` would compare values, element by element
            return group
    what = repr(param) if isinstance(param, str) else f"this parameter of shape {tuple(param.shape)}"
    raise ValueError(f"No group of {type(optimizer).__name__} holds {what}: it is frozen, or it is not in the model.")


def learning_rates(optimizer: Optimizer | None) -> list[float]:
    """The learning rate of every parameter group. ValueError where there is no optimizer."""
    return [group["lr"] for group in _existing(optimizer).param_groups]


def get_model_param_count(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of elements in the parameters; of a parameter that DeepSpeed has partitioned, its full size."""
    return sum(
        getattr(parameter, "ds_numel", None) or parameter.numel()
        for parameter in model.parameters()
        if parameter.requires_grad or not trainable_only
    )


def num_trainable_parameters(model: nn.Module) -> int:
    """Number of trainable elements."""
    return get_model_param_count(model, trainable_only=True)


def get_module_class_from_name(module: nn.Module, name: str) -> type[nn.Module] | None:
    """The class called `name` among `module` and everything in it; None where there is none."""
    return next((type(member) for member in module.modules() if type(member).__name__ == name), None)


def check_target_module_exists(
    optim_target_modules: str | Sequence[str], key: str, return_is_regex: bool = False
) -> bool | tuple[bool, bool]:
    """Whether the module called `key` is a target; with `return_is_regex`, also whether by a regular expression.

    A string is a regular expression for the whole name. Of a list, an entry matches where it is part of the name, or a
    regular expression for the whole name.
    """
    if isinstance(optim_target_modules, str):
        is_regex = optim_target_modules != key
        found = not is_regex or re.fullmatch(optim_target_modules, key) is not None
    elif any(target in key for target in optim_target_modules):
        found, is_regex = True, False
    else:
        found = is_regex = any(re.fullmatch(target, key) for target in optim_target_modules)
    return (found, is_regex) if return_is_regex else found
