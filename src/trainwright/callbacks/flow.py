"""When a run logs, evaluates, saves and stops.

Owns: turning the strategies and intervals of the arguments into flags on `control`. Leaves to others: doing what the
flags ask for (the loop), and intervals given as a share of the run (`TrainerState.compute_steps`).
Source: seed 001 (strategies, `eval_delay`, `logging_first_step`). The flags were compared with both generations, which
differ in one: the newer also evaluates at the last step. So do we, because otherwise the final weights are never
evaluated; under the drop-in the installed generation decides (`_evaluates_last_step` of the arguments).
"""

from __future__ import annotations

import math
import sys
from typing import Any

from trainwright.callbacks.base import TrainerCallback
from trainwright.names import IntervalStrategy, SaveStrategy
from trainwright.state import TrainerControl, TrainerState

# Bound here once, because reading a member from an enum class runs Python code up to 3.11. Comparing with == does not
# (the enums are strings), and unlike `is` it also understands a plain "steps".
STEPS, EPOCH = IntervalStrategy.STEPS, IntervalStrategy.EPOCH
SAVE_STEPS, SAVE_EPOCH = SaveStrategy.STEPS, SaveStrategy.EPOCH


class DefaultFlowCallback(TrainerCallback):
    """Asks for logs, evaluations and checkpoints when the arguments say so, and for the end at the last step."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        step = state.global_step
        is_last = step >= state.max_steps
        is_log_step = args.logging_strategy == STEPS and step % state.logging_steps == 0
        if is_log_step or (step == 1 and args.logging_first_step):
            control.should_log = True
        if args.eval_strategy == STEPS and (args.eval_delay or 0) <= step:
            is_end = is_last and getattr(args, "_evaluates_last_step", True)
            if is_end or step % state.eval_steps == 0:
                control.should_evaluate = True
        if args.save_strategy == SAVE_STEPS and (is_last or (state.save_steps > 0 and step % state.save_steps == 0)):
            control.should_save = True
        if is_last:  # epoch strategies act in on_epoch_end, which follows
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if args.logging_strategy == EPOCH:
            control.should_log = True
        if args.eval_strategy == EPOCH and (args.eval_delay or 0) <= (state.epoch or 0.0):
            control.should_evaluate = True
        if args.save_strategy == SAVE_EPOCH:
            control.should_save = True
        return control


def scheduled(args: Any, state: TrainerState) -> tuple[int, int | None]:
    """How many evaluations and saves the arguments ask for after `state.global_step`. Saves are None where each follows
    a new best metric, so that nobody knows.
    """
    ends_left = _epoch_ends_left(state)
    evaluations = saves = 0
    if args.eval_strategy == STEPS:
        at_end = getattr(args, "_evaluates_last_step", True)
        evaluations = _multiples_left(state, state.eval_steps, first=args.eval_delay or 0, at_end=at_end)
    elif args.eval_strategy == EPOCH:
        too_early = math.ceil(args.eval_delay or 0) - 1 - math.floor(state.epoch or 0.0)  # of the ends that are left
        evaluations = max(ends_left - max(too_early, 0), 0)
    if args.save_strategy == SAVE_STEPS:
        saves = _multiples_left(state, state.save_steps, first=0, at_end=True)
    elif args.save_strategy == SAVE_EPOCH:
        saves = ends_left
    return evaluations, None if args.save_strategy == SaveStrategy.BEST else saves


def _multiples_left(state: TrainerState, interval: float, *, first: float, at_end: bool) -> int:
    """Steps after this one, from `first` on, that are a multiple of `interval`, and the last step `at_end`."""
    done, last = state.global_step, state.max_steps
    if done >= last or first > last:
        return 0
    before = max(done, math.ceil(first) - 1)
    multiples = int(last // interval - before // interval) if interval > 0 else 0
    return multiples + (at_end and (interval <= 0 or last % interval != 0))


def _epoch_ends_left(state: TrainerState) -> int:
    """Ends of epochs that are to come; a stream's pass counts as long as the run."""
    if state.num_train_epochs == sys.maxsize:
        return int(state.global_step < state.max_steps)
    return max(state.num_train_epochs - math.floor(state.epoch or 0.0), 0)
