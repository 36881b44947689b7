"""What a run will do, and its optimizer to which parameters, as a block of text to read before it starts.

Owns: the words, rows and look of that block. Leaves to others: how long a run is (`plan`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainwright.names import some

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from trainwright.args.training import TrainingArguments
    from trainwright.plan import TrainingPlan

_MAX_NAMED = 5  # parameters of a group
MAX_WIDTH = 100  # columns; wider than a terminal, the block would wrap in the wrong place


def plan_table(rows: Sequence[tuple[str, str]]) -> str:
    """Lay out `rows` of (what, how much) in two columns; long values continue below their own column.

    A value may hold line breaks. An empty name continues the row above; a row of two empty texts is a blank line.

    >>> print(plan_table([("samples", "12,800"), ("total batch", "64 = 8 per device x 2 devices x 4 accumulated")]))
      samples      12,800
      total batch  64 = 8 per device x 2 devices x 4 accumulated
    """
    name_width = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, value in rows:
        pieces = [piece for line in str(value).splitlines() for piece in _wrapped(line, name_width)] or [""]
        for index, piece in enumerate(pieces):
            lines.append(f"  {name if index == 0 else '':<{name_width}}  {piece}".rstrip())
    return "\n".join(lines)


def _wrapped(line: str, name_width: int) -> list[str]:
    # Paths and names stay whole: a broken path cannot be copied.
    width = max(MAX_WIDTH - name_width - 4, 20)
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]


def describe_run(
    args: TrainingArguments,
    plan: TrainingPlan,
    samples_per_update: int,
    samples_per_micro_batch: int,
    num_processes: int,
    num_trainable_parameters: int,
    optimizer: Optimizer,
    model: nn.Module,
) -> str:
    """The length of a run and the sizes of its batches, then `group_table`."""
    epochs = args.num_train_epochs if plan.epoch_based else f"{plan.max_steps / plan.num_update_steps_per_epoch:.2f}"
    return (
        f"Running training: {plan.num_examples:,} samples per epoch, {epochs} epochs, {samples_per_update:,} samples "
        f"per update ({samples_per_micro_batch} per micro-batch x {args.gradient_accumulation_steps} accumulated x "
        f"{num_processes} processes), {plan.max_steps:,} updates, {num_trainable_parameters:,} trainable "
        f"parameters.\nOptimizer {type(optimizer).__name__}:\n{group_table(optimizer, model)}"
    )


def group_table(optimizer: Optimizer, model: nn.Module) -> str:
    """One row for the parameter groups of each learning rate and weight decay: how many parameters, and which."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows: dict[tuple[Any, Any], list[nn.Parameter]] = {}
    for group in optimizer.param_groups:  # layer-wise optimizers have one for each parameter
        rate = float(group.get("initial_lr", group["lr"]) or 0.0)
        decay = group.get("weight_decay", getattr(optimizer, "weight_decay", None))
        rows.setdefault((rate, decay), []).extend(group["params"])
    lines = []
    for (rate, decay), parameters in rows.items():
        if not parameters:
            continue
        num_numbers, num_tensors = sum(p.numel() for p in parameters), len(parameters)
        what = f"{num_numbers:,} parameters in {num_tensors:,} tensor{'s' if num_tensors > 1 else ''}: "
        what += some([names.get(id(p), "(not in the model)") for p in parameters], _MAX_NAMED)
        lines.append((f"lr {rate:g}, weight decay {decay:g}" if decay is not None else f"lr {rate:g}", what))
    return plan_table(lines)
