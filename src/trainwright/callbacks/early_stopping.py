"""Stop a run whose metric no longer improves.

Owns: counting evaluations without improvement. Leaves to others: which checkpoint is best, and loading it
(`checkpoint/best`).
Source: seed 000 (arguments and what they mean), seed 001 (`metric_for_best_model`, `greater_is_better`).
"""

from __future__ import annotations

import logging
import math
from typing import Any

from trainwright.callbacks.base import TrainerCallback
from trainwright.names import IntervalStrategy, closest
from trainwright.state import ExportableState, TrainerControl, TrainerState

logger = logging.getLogger(__name__)


class EarlyStoppingCallback(TrainerCallback, ExportableState):
    """Ends training after `early_stopping_patience` evaluations in a row that did not improve the metric.

    early_stopping_patience: evaluations without improvement before training ends; 0 ends it at the first evaluation.
    early_stopping_threshold: how much better than the best so far an evaluation must be to count as improvement, in the
        unit of the metric. A smaller gain uses up patience, yet still becomes the value to beat.

    The metric is `metric_for_best_model`, with or without "eval_". An evaluation counts once per step, and only during
    training, so calling `trainer.evaluate()` yourself uses up no patience. NaN is no improvement. The callback keeps
    the best value itself, so it does not depend on how often a checkpoint is written.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        if isinstance(early_stopping_patience, bool) or not isinstance(early_stopping_patience, int):
            raise TypeError(
                f"early_stopping_patience must be a number of evaluations, not {early_stopping_patience!r}."
            )
        if early_stopping_patience < 0:
            raise ValueError(f"early_stopping_patience must be at least 0 evaluations, not {early_stopping_patience}.")
        threshold = 0.0 if early_stopping_threshold is None else early_stopping_threshold
        if not isinstance(threshold, (int, float)) or not threshold >= 0:
            raise ValueError(
                f"early_stopping_threshold must be a number of at least 0, not {threshold!r}: it is the size of a "
                "gain, whether the metric should rise or fall."
            )
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = threshold
        self.early_stopping_patience_counter = 0
        self.best_value: float | None = None
        self._is_training = False
        self._counted_step: int | None = None  # the step whose evaluation was counted last
        self._missed_step: int | None = None  # a step that was evaluated and did not show the metric yet
        self._metric_names: set[str] = set()  # of the evaluations without the metric
        self._has_warned = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.metric_for_best_model is None:
            raise ValueError(
                "EarlyStoppingCallback needs metric_for_best_model, which is None. "
                'Set it to what should improve, such as metric_for_best_model="loss".'
            )
        if args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                'EarlyStoppingCallback needs evaluations during training, and eval_strategy is "no". '
                'Set eval_strategy to "steps" or "epoch".'
            )
        if not args.load_best_model_at_end:
            logger.warning(
                "EarlyStoppingCallback is used without load_best_model_at_end=True, so a run that it ends keeps its "
                "last weights, not its best."
            )
        self._is_training, self._counted_step, self._missed_step, self._has_warned = True, None, None, False
        self._metric_names.clear()
        if state.global_step == 0:
            self.early_stopping_patience_counter, self.best_value = 0, None
        elif state.best_metric is not None:
            self.best_value = state.best_metric

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        if not self._is_training or state.global_step == self._counted_step:
            return
        metrics = metrics or {}
        name = _metric_name(args)
        if name not in metrics:
            self._metric_names.update(metrics)
            # Several evaluation datasets come one by one, so only a later step shows that none of them has the metric.
            if self._missed_step not in (None, state.global_step):
                self._warn_missing(name)
            self._missed_step = state.global_step
            return
        self._counted_step, self._missed_step = state.global_step, None
        self.check_metric_value(args, state, control, metrics[name])
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._missed_step is not None:
            self._warn_missing(_metric_name(args))
        self._is_training = False

    def check_metric_value(self, args: Any, state: TrainerState, control: TrainerControl, metric_value: Any) -> None:
        """Count `metric_value` as an improvement or as an evaluation without one, and remember the best."""
        value = float(metric_value)
        rises = args.greater_is_better
        if rises is None:
            rises = not args.metric_for_best_model.endswith("loss")
        if math.isnan(value):
            gain = -math.inf
        elif self.best_value is None:
            gain = math.inf
        else:
            gain = value - self.best_value if rises else self.best_value - value
        if gain > 0:
            self.best_value = value
        if gain > self.early_stopping_threshold:
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1

    def state(self) -> dict[str, Any]:
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {
                "early_stopping_patience_counter": self.early_stopping_patience_counter,
                "best_value": self.best_value,
            },
        }

    def _warn_missing(self, name: str) -> None:
        if not self._has_warned:
            logger.warning(
                "EarlyStoppingCallback cannot stop this run: no evaluation has %r. They have %s.%s",
                name,
                ", ".join(sorted(self._metric_names)) or "no metrics",
                closest(name, self._metric_names),
            )
            self._has_warned = True


def _metric_name(args: Any) -> str:
    name: str = args.metric_for_best_model
    return name if name.startswith("eval_") else f"eval_{name}"
