"""The length of a run and the parameter groups of its optimizer, as text to read before training.

Owns: the rows of that text. Leaves to others: its layout (`report/plan_table.py`).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainwright.plan import TrainingPlan
from trainwright.report.plan_table import plan_table

_MOST_NAMED = 3  # parameters of a group, from its start; its last one is named too


def describe_run(
    args: Any,
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
        what += _some([names.get(id(p), "(not in the model)") for p in parameters])
        lines.append((f"lr {rate:g}, weight decay {decay:g}" if decay is not None else f"lr {rate:g}", what))
    return plan_table(lines)


def _some(names: list[str]) -> str:
    if len(names) <= _MOST_NAMED + 2:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMED])}, ..., {names[-1]}"
