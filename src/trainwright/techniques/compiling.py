"""`torch_compile` and `use_regional_compilation`: the whole model as one region, or each repeated block separately.

Owns: which modules are compiled. Leaves to others: compiling them (torch). Names of weights do not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from trainwright.interop.blocks import repeated_blocks

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments


def compile_as_asked(model: nn.Module, args: TrainingArguments) -> None:
    """`compile_model` with the backend, mode and regions of a run's arguments."""
    backend, mode = args.torch_compile_backend or "inductor", args.torch_compile_mode
    compile_model(model, backend, mode, args.use_regional_compilation)


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
