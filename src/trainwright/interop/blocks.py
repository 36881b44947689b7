"""The repeated blocks of a model, which are checkpointed, compiled or sharded one by one.

Owns: finding them, in any `nn.Module`. Leaves to others: what is done with each (`techniques/checkpointing.py`,
`techniques/compiling.py`, `parallel/fsdp_units.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trainwright.names import closest


def repeated_blocks(model: nn.Module, class_names: Sequence[str] | None, asked_by: str) -> list[nn.Module]:
    """The outermost modules whose class is in `class_names`, in the order of the model.

    Without names: the elements of every `nn.ModuleList` or `nn.Sequential` that holds at least two, all of one class,
    each made of several modules (the layers of a transformer, the stages of a convolutional network).

    Raises ValueError where there are none. It names `asked_by`, the argument as code, and the classes that there are.
    """
    if class_names:
        found = _outermost(model, set(class_names))
        missing = set(class_names) - {type(block).__name__ for block in found}
        if missing:
            name = sorted(missing)[0]
            there = _class_names(model)
            raise ValueError(
                f"{asked_by} names the class {name!r}, which no module of {type(model).__name__} has. Its classes are "
                f"{there}.{closest(name, there)}"
            )
        return found
    blocks = _elements_of_lists(model)
    if not blocks:
        raise ValueError(
            f"{asked_by} needs repeated blocks, and {type(model).__name__} has no nn.ModuleList or nn.Sequential of "
            f"several modules of one class. Name the classes of its blocks instead, among {_class_names(model)}."
        )
    return blocks


def _outermost(module: nn.Module, names: set[str]) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if type(child).__name__ in names else _outermost(child, names)
    return found


def _elements_of_lists(module: nn.Module) -> list[nn.Module]:
    children = list(module.children())
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1:
        one_class = len({type(child) for child in children}) == 1
        if one_class and all(any(True for _ in child.children()) for child in children):
            return children
    return [block for child in children for block in _elements_of_lists(child)]


def _class_names(model: nn.Module) -> list[str]:
    return sorted({type(module).__name__ for module in model.modules() if module is not model})
