"""GreedyLR: raise the learning rate while the metric improves, lower it while it does not.

Owns: the schedule and its optional moving average. Leaves to others: when an evaluation produces the metric.
Source: the paper "Dynamic Learning Rate Scheduling based on Loss Changes" (arXiv 2512.14527); the documented arguments.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trainwright.names import closest


class StreamingAverage:
    """The mean of the last `window_size` values, in constant time per value."""

    def __init__(self, window_size: int) -> None:
        self.window_size = window_size
        self.values: list[float] = []
        self.sum = 0.0

    def streamavg(self, value: float) -> float:
        """Add `value`, drop the oldest where the window is full, and return the mean."""
        self.values.append(value)
        self.sum += value
        if len(self.values) > self.window_size:
            self.sum -= self.values.pop(0)
        return self.sum / len(self.values)

    def state_dict(self) -> dict[str, Any]:
        return {"window_size": self.window_size, "values": list(self.values), "sum": self.sum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.window_size = state_dict["window_size"]
        self.values = list(state_dict["values"])
        self.sum = state_dict["sum"]


class GreedyLR:
    """Raise the learning rate (divide by `factor`) after more than `patience` good evaluations in a row, else lower it.

    - `mode`: "min" where a smaller metric is better, "max" where a larger one is.
    - `factor`: in (0, 1).
    - `threshold`, `threshold_mode`: by how much the best must be beaten, "abs" in the metric's units, "rel" as a share.
    - `cooldown`, `warmup`: evaluations that are ignored after a reduction and after an increase.
    - `min_lr`, `max_lr`: bounds, one number or one per parameter group.
    - `eps`: smaller changes are not applied.
    - `smooth`, `window_size`: use the mean of the last evaluations instead of the last one.
    - `reset_start`: reductions at the lower bound until every rate is reset to its initial value.
    - `verbose`: print each change.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.95,
        patience: int = 10,
        threshold: float = 1e-6,
        threshold_mode: str = "abs",
        cooldown: int = 0,
        warmup: int = 0,
        min_lr: float | list[float] = 1e-3,
        max_lr: float | list[float] = 1.0,
        eps: float = 1e-8,
        verbose: bool = False,
        smooth: bool = False,
        window_size: int = 50,
        reset_start: int = 500,
    ) -> None:
        if factor >= 1.0:
            raise ValueError(f"factor={factor} must be below 1: the learning rate is multiplied or divided by it.")
        for argument, value, allowed in (
            ("mode", mode, ("min", "max")),
            ("threshold_mode", threshold_mode, ("rel", "abs")),
        ):
            if value not in allowed:
                raise ValueError(f"{argument}={value!r} is unknown; choose one of {allowed}.{closest(value, allowed)}")
        self.optimizer = optimizer
        self.factor = factor
        self.patience = patience
        self.verbose = verbose
        self.cooldown = cooldown
        self.warmup = warmup
        self.cooldown_counter = 0
        self.warmup_counter = 0
        self.mode = mode
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.eps = eps
        self.smooth = smooth
        self.window_size = window_size
        self.reset_start = reset_start  # reductions left at the lower bound before a reset
        self.reset_start_original = reset_start
        self.last_epoch = 0
        self.min_lrs = self._one_per_group("min_lr", min_lr)
        self.max_lrs = self._one_per_group("max_lr", max_lr)
        self._init_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._last_lr = list(self._init_lrs)
        self.best = self._worst()
        self.num_bad_epochs = 0
        self.num_good_epochs = 0
        self._streaming_avg = StreamingAverage(window_size) if smooth else None

    def step(self, metrics: float, epoch: int | None = None) -> None:
        """Adjust the learning rates after one evaluation."""
        current = float(metrics)
        if self._streaming_avg is not None:
            current = self._streaming_avg.streamavg(current)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if self.cooldown_counter > 0 or self.warmup_counter > 0:
            self.cooldown_counter = max(0, self.cooldown_counter - 1)
            self.warmup_counter = max(0, self.warmup_counter - 1)
            self.num_bad_epochs = self.num_good_epochs = 0
        elif self.is_better(current, self.best):
            self.best = current
            self.num_good_epochs += 1
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
            self.num_good_epochs = 0

        if self.num_good_epochs > self.patience:
            self._rescale(rising=True)
            self.reset_start = self.reset_start_original
            self.warmup_counter = self.warmup
            self.num_good_epochs = 0
        elif self.num_bad_epochs > self.patience:
            self._rescale(rising=False)
            self._count_towards_reset()
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

    def is_better(self, current: float, best: float) -> bool:
        """Whether `current` beats `best` by more than the threshold; NaN beats nothing."""
        change = self.threshold if self.mode == "max" else -self.threshold
        bound = best * (1.0 + change) if self.threshold_mode == "rel" else best + change
        return current > bound if self.mode == "max" else current < bound

    def get_last_lr(self) -> list[float]:
        """The learning rate of every parameter group after the last step."""
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """Every field but the optimizer, as plain values."""
        left_out = ("optimizer", "_streaming_avg")
        state = {name: value for name, value in vars(self).items() if name not in left_out}
        if self._streaming_avg is not None:
            state["_streaming_avg"] = self._streaming_avg.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict()` returned, the learning rates of the parameter groups included."""
        state = dict(state_dict)
        average = state.pop("_streaming_avg", None)
        vars(self).update(state)
        if average is not None:
            self._streaming_avg = StreamingAverage(self.window_size)
            self._streaming_avg.load_state_dict(average)
        for group, lr in zip(self.optimizer.param_groups, self._last_lr):
            _set_rate(group, lr)

    def _rescale(self, rising: bool) -> None:
        # rising:  lr <- min(lr / factor, max_lr)                          after more than `patience` better evaluations
        # falling: lr <- max(lr * factor, min_lr)                          after more than `patience` others
        for group, lowest, highest in zip(self.optimizer.param_groups, self.min_lrs, self.max_lrs):
            old = float(group["lr"])
            new = min(old / self.factor, highest) if rising else max(old * self.factor, lowest)
            # Signed, so that a rate outside the bounds is not moved against the direction of the metric.
            if (new - old if rising else old - new) > self.eps:
                _set_rate(group, new)
                if self.verbose:
                    print(f"Evaluation {self.last_epoch}: learning rate {old:.4e} -> {new:.4e}")

    def _count_towards_reset(self) -> None:
        if any(group["lr"] > lowest for group, lowest in zip(self.optimizer.param_groups, self.min_lrs)):
            return
        self.reset_start -= 1
        if self.reset_start <= 0:
            self._reset()

    def _reset(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self._init_lrs):
            _set_rate(group, lr)
        self.best = self._worst()
        self.num_bad_epochs = self.num_good_epochs = 0
        self.cooldown_counter = self.warmup_counter = 0
        self.reset_start = self.reset_start_original
        if self._streaming_avg is not None:
            self._streaming_avg = StreamingAverage(self.window_size)

    def _worst(self) -> float:
        return -math.inf if self.mode == "max" else math.inf

    def _one_per_group(self, argument: str, value: float | list[float]) -> list[float]:
        num_groups = len(self.optimizer.param_groups)
        if not isinstance(value, (list, tuple)):
            return [value] * num_groups
        if len(value) != num_groups:
            raise ValueError(
                f"{argument} has {len(value)} values, but the optimizer has {num_groups} parameter groups."
            )
        return list(value)


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # torchao's compiled update holds a reference to it
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
