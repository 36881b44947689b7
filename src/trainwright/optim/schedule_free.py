"""Schedule-free optimizers have two sets of weights: they train at one point and evaluate at an average.

Owns: switching the model between the two. Leaves to others: when (`trainer.py`). The switch computes one set from the
other in place, so it rounds: it happens only where the other set is needed, and a resumed run makes the same switches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def find_schedule_free(optimizer: object) -> object | None:
    """The schedule-free optimizer: `optimizer`, or one that it combines; None where there is none."""
    inside = getattr(optimizer, "optimizers", None)
    if isinstance(inside, list):  # a CombinedOptimizer, whose `eval` switches the inner ones
        return next((found for part in inside if (found := find_schedule_free(part)) is not None), None)
    return optimizer if callable(getattr(optimizer, "eval", None)) else None


def switch_mode(optimizer: object, training: bool) -> None:
    """Put the weights to train, or those to evaluate and save, into the model; a no-op for other optimizers."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


@contextlib.contextmanager
def schedule_free_eval(optimizer: object) -> Iterator[None]:
    """Within the block the model holds the weights to evaluate and save; afterwards those it held before."""
    training = any(group.get("train_mode") for group in getattr(optimizer, "param_groups", ()))
    switch_mode(optimizer, training=False)
    try:
        yield
    finally:
        if training:
            switch_mode(optimizer, training=True)
