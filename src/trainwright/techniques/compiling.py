"""`torch_compile` and `use_regional_compilation`: the whole model as one region, or each repeated block separately.

Owns: which modules are compiled. Leaves to others: compiling them (torch). Names of weights do not change.
"""

from __future__ import annotations

from torch import nn

from trainwright.interop.blocks import repeated_blocks


def compile_model(
    model: nn.Module, backend: str, mode: str | None, regions: bool | list[str] | str | None
) -> list[nn.Module]:
    """Compile `model` in place; with `regions`, its repeated blocks (or the modules of the classes named there).

    Blocks of one class share one compiled program, so compilation takes the time of one block instead of all; the code
    between them is not compiled. Returns the modules that were compiled. Raises ValueError where there are no blocks.
    """
    chosen = [model]
    if regions:
        names = regions if isinstance(regions, list) else None
        chosen = repeated_blocks(model, names, asked_by=f"use_regional_compilation={regions!r}")
    for module in chosen:
        module.compile(backend=backend, mode=mode)
    return chosen
