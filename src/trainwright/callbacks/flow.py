"""When a run logs, evaluates, saves and stops.

Owns: turning the strategies and intervals of the arguments into flags on `control`. Leaves to others: doing what the
flags ask for (the loop), and intervals given as a share of the run (`TrainerState.compute_steps`).
Source: seed 001 (strategies, `eval_delay`, `logging_first_step`). The flags were compared with both generations, which
differ in one: the newer also evaluates at the last step. So do we, because otherwise the final weights are never
evaluated; under the drop-in the installed generation decides (`_evaluates_last_step` of the arguments).
"""

from __future__ import annotations

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
        if args.eval_strategy == STEPS and args.eval_delay <= step:
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
        if args.eval_strategy == EPOCH and args.eval_delay <= (state.epoch or 0.0):
            control.should_evaluate = True
        if args.save_strategy == SAVE_EPOCH:
            control.should_save = True
        return control
