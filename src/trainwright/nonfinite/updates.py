"""An update whose loss or gradients are not finite: its description, and whether to roll back.

Owns: `UpdatePosition`, `BadUpdate`, `NonFiniteError`, and whether a rollback would help. Leaves to others: finding such
updates (`guard`), going back (`attempts`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

logger = logging.getLogger(__name__)

_MOST_ROLLBACKS = 10  # a run that needs more has diverged
MAX_NAMED = 10  # steps or tensors that a message lists

ADVICE = (
    "Positions count samples in the order of their epoch, over all processes. Look at those samples; try a lower "
    "learning_rate, a longer warm-up or a smaller max_grad_norm; torch.autograd.set_detect_anomaly(True) names the "
    "operation. nonfinite='skip' skips such updates, 'rollback' goes back to the last checkpoint and skips their data, "
    "'ignore' uses them."
)


class UpdatePosition(NamedTuple):
    """The position of an update: its step (the first is 1), its epoch, and its samples in the order of that epoch."""

    step: int
    epoch: int
    first_sample: int
    samples_per_micro_batch: int  # over all processes


@dataclass(frozen=True)
class BadUpdate:
    """An update with a loss or a gradient that is NaN or infinite."""

    place: UpdatePosition
    losses: tuple[float, ...]  # each micro-batch's share of the loss
    grad_norm: float
    is_held_back: bool  # weights and optimizer state were not changed by it

    @property
    def samples(self) -> range:
        """Positions in the epoch."""
        first, size = self.place.first_sample, self.place.samples_per_micro_batch
        return range(first, first + len(self.losses) * size)

    def __str__(self) -> str:
        samples, size = self.samples, self.place.samples_per_micro_batch
        parts = [
            f"loss {loss} in micro-batch {index + 1} of {len(self.losses)} "
            f"(samples {_span(samples[index * size : (index + 1) * size])})"
            for index, loss in enumerate(self.losses)
            if not math.isfinite(loss)
        ]
        finite = [f"{loss:.6g}" for loss in self.losses if math.isfinite(loss)]
        if finite:
            parts.append(f"finite losses {', '.join(finite)}")
        parts.append(f"gradient norm {self.grad_norm:.6g}")
        return f"step {self.place.step} (epoch {self.place.epoch}, samples {_span(samples)}): {', '.join(parts)}"


class NonFiniteError(FloatingPointError):
    """The loss, the gradients or the weights are NaN or infinite.

    `updates` are those affected, oldest first; empty where only another rank knows of them.
    """

    def __init__(self, message: str, updates: Sequence[BadUpdate] = ()) -> None:
        super().__init__(message)
        self.updates = list(updates)


def check_rollback(
    error: NonFiniteError, policy: str, checkpoint: str | None, excluded: Sequence[tuple[int, range]]
) -> list[tuple[int, range]]:
    """The samples to skip, as (epoch, samples), after a rollback to `checkpoint` because of `error`.

    Raises `error` where `policy` is not "rollback", NonFiniteError where a rollback would not help.
    """
    if policy != "rollback" or not error.updates:
        raise error
    if checkpoint is None:
        reason = "There is no checkpoint yet to roll back to: set save_steps lower."
        raise NonFiniteError(f"{error} {reason}", error.updates)
    if len(excluded) >= _MOST_ROLLBACKS:
        raise NonFiniteError(f"{error} This run went back {_MOST_ROLLBACKS} times already, and stops.", error.updates)
    logger.warning("%s ROLLING BACK to %s; these samples will be skipped.", error, checkpoint)
    return [*excluded, *((update.place.epoch, update.samples) for update in error.updates)]


def _span(samples: range) -> str:
    return f"{samples.start} to {samples.stop - 1}"
