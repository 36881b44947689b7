"""Which modules of a model are gathered, computed and freed together.

Owns: the choice, by class, by size, or by what repeats, and that parameters which share memory are chosen together.
Leaves to others: sharding them (`fsdp.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from trainwright.interop.blocks import repeated_blocks

if TYPE_CHECKING:
    from trainwright.args.fsdp_config import FsdpConfig

# Modules that nobody calls, so that nothing would gather their parameters.
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# Modules that read the parameters of those inside them, without calling these.
_INDIVISIBLE = (nn.MultiheadAttention,)


def units_to_shard(model: nn.Module, config: FsdpConfig) -> list[nn.Module]:
    """The modules inside `model`, inner ones first, each to be gathered by itself; what is in none of them is gathered
    with the model.

    Raises ValueError for a class that no module has.
    """
    if config.auto_wrap_policy == "no_wrap":
        return []
    if config.min_num_params and config.auto_wrap_policy != "transformer_based_wrap":
        found = _by_size(model, config.min_num_params)
    elif config.transformer_layer_cls_to_wrap:
        names = config.transformer_layer_cls_to_wrap
        found = repeated_blocks(model, names, asked_by=f"fsdp_config transformer_layer_cls_to_wrap={names}")
    else:
        found = _layers(model)
    return _without_broken_ties(model, found)


def _layers(model: Any) -> list[nn.Module]:
    """The layers as a `transformers` model names them, else the blocks that repeat; none in a model without."""
    base = model
    while getattr(base, "_no_split_modules", None) is None and getattr(base, "base_model", base) is not base:
        base = base.base_model.model if hasattr(base.base_model, "model") else base.base_model  # of peft
    there = {type(module).__name__ for module in model.modules()}
    names = [name for name in getattr(base, "_no_split_modules", None) or () if name in there]
    try:
        return repeated_blocks(model, names or None, asked_by="fsdp")
    except ValueError:
        return []


def _by_size(model: nn.Module, least: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    counted: set[int] = set()

    def visit(module: nn.Module) -> int:
        """How many parameters of `module` are in no unit found so far."""
        num_left = 0
        for parameter in module.parameters(recurse=False):
            num_left += 0 if id(parameter) in counted else parameter.numel()
            counted.add(id(parameter))
        if isinstance(module, _INDIVISIBLE):
            num_left += sum(p.numel() for p in module.parameters() if id(p) not in counted)
            counted.update(map(id, module.parameters()))
        else:
            num_left += sum(visit(child) for child in module.children())
        if num_left >= least and module is not model and not isinstance(module, _NEVER_CALLED):
            found.append(module)
            return 0
        return num_left

    visit(model)
    return found


def _without_broken_ties(model: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    """`units` without those that have some of the places of a shared parameter but not all: it can be gathered in one
    unit only.
    """
    places = _num_places(model)
    if all(count == 1 for count in places.values()):
        return units
    return [unit for unit in units if all(places[key] == count for key, count in _num_places(unit).items())]


def _num_places(module: nn.Module) -> dict[int, int]:
    """In how many places of `module` each parameter is, by its id; one in a shared module has several."""
    found: dict[int, int] = {}
    for _, inner in module.named_modules(remove_duplicate=False):
        for parameter in inner._parameters.values():
            if parameter is not None:
                found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found
