"""When a run logs, evaluates and saves, counted without running it.

Owns: the numbers of these events. Leaves to others: asking for them (`callbacks/flow`), intervals that are a share of
the run (`TrainerState.compute_steps`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainwright.names import IntervalStrategy, SaveStrategy
from trainwright.state import TrainerState

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments
    from trainwright.plan import TrainingPlan


def events_of(args: TrainingArguments, plan: TrainingPlan) -> dict[str, dict[str, Any]]:
    """Of "log", "evaluate" and "save": `strategy`, `every_steps` (None: no interval in steps) and `count` (None: not
    known before). Callbacks of the user may ask for more.
    """
    intervals = TrainerState()
    intervals.compute_steps(args, plan.max_steps)
    epochs = _ends_of_epochs(plan)

    logs = _event(args.logging_strategy, intervals.logging_steps)
    first = int(args.logging_first_step and plan.max_steps > 0)  # with any strategy
    if args.logging_strategy == IntervalStrategy.STEPS:
        logs["count"] = _multiples(logs["every_steps"], plan.max_steps) + (first if logs["every_steps"] != 1 else 0)
    elif args.logging_strategy == IntervalStrategy.EPOCH:
        first = first if plan.num_update_steps_per_epoch > 1 else 0  # a step is logged once
        logs["count"] = None if epochs is None else len(epochs) + first
    else:
        logs["count"] = first

    delay = args.eval_delay or 0
    evaluations = _event(args.eval_strategy, intervals.eval_steps)
    if args.eval_strategy == IntervalStrategy.STEPS:
        every, last = evaluations["every_steps"] or 1, plan.max_steps
        before = _multiples(every, int(-(-delay // 1)) - 1)  # steps below the delay
        also_last = getattr(args, "_evaluates_last_step", True) and last % every and delay <= last
        evaluations["count"] = max(0, _multiples(every, last) - before) + bool(also_last)
    elif args.eval_strategy == IntervalStrategy.EPOCH:
        evaluations["count"] = None if epochs is None else sum(delay <= end for end in epochs)
    if args.eval_on_start and evaluations["count"] is not None:
        evaluations["count"] += 1
    evaluations["on_start"] = bool(args.eval_on_start)

    saves = _event(args.save_strategy, intervals.save_steps)
    if args.save_strategy == SaveStrategy.STEPS:
        every = saves["every_steps"] or plan.max_steps
        saves["count"] = -(-plan.max_steps // every) if every else 0  # the last step is saved, too
    elif args.save_strategy == SaveStrategy.EPOCH:
        saves["count"] = None if epochs is None else len(epochs)
    elif args.save_strategy == SaveStrategy.BEST:
        saves["count"] = None
    return {"log": logs, "evaluate": evaluations, "save": saves}


def _event(strategy: Any, interval: float | None) -> dict[str, Any]:
    name = getattr(strategy, "value", str(strategy))
    return {"strategy": name, "every_steps": int(interval or 0) or None if name == "steps" else None, "count": 0}


def _multiples(every: int | None, last: int) -> int:
    """Multiples of `every` among 1 .. `last`."""
    return max(0, last) // every if every else 0


def _ends_of_epochs(plan: TrainingPlan) -> list[float] | None:
    """The epoch at which each pass ends, the last perhaps cut short; None for data without a length."""
    if plan.len_dataloader is None:
        return None
    length = plan.max_steps / plan.num_update_steps_per_epoch
    return [min(float(number), length) for number in range(1, plan.num_train_epochs + 1)]
