"""The learning rates of a run, from its schedule, without stepping it.

Owns: first, highest and last rate, and the parameter groups. Leaves to others: building schedules (`optim/`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments

_NUM_POINTS = 1000  # of a schedule that are looked at, besides the end of the warmup


def schedule_of(args: TrainingArguments, scheduler: Any, max_steps: int, *, is_given: bool) -> dict[str, Any]:
    """`name`, `warmup_steps`, and the first parameter group's rates in the first update, at most, and in the last.

    is_given: the user passed `scheduler`, and the arguments say nothing of it. Rates are None where only running it
    shows them.
    """
    kind = getattr(args.lr_scheduler_type, "value", str(args.lr_scheduler_type))
    warmup = None if is_given else args.get_warmup_steps(max_steps)
    first = highest = last = None
    if isinstance(scheduler, LambdaLR):
        base, factor = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
        steps = {0, max(0, max_steps - 1), *(max_steps * point // _NUM_POINTS for point in range(_NUM_POINTS))}
        steps |= {step for step in (warmup or 0,) if step < max_steps}
        rates = {step: float(base) * float(factor(step)) for step in steps}
        first, last, highest = rates[0], rates[max(0, max_steps - 1)], max(rates.values())
    return {
        "name": type(scheduler).__name__ if is_given else kind,
        "warmup_steps": warmup,
        "first_learning_rate": first,
        "highest_learning_rate": highest,
        "last_learning_rate": last,
    }


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """For each learning rate and weight decay: how many numbers of the model's have them."""
    found: dict[tuple[float, float | None], int] = {}
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", getattr(optimizer, "weight_decay", None))
        rate = float(group.get("initial_lr", group["lr"]) or 0.0)
        key = rate, None if decay is None else float(decay)
        found[key] = found.get(key, 0) + sum(parameter.numel() for parameter in group["params"])
    return [
        {"learning_rate": rate, "weight_decay": decay, "parameters": number}
        for (rate, decay), number in found.items()
        if number
    ]
