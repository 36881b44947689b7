"""Learning-rate schedules under their documented names.

Owns: the `get_*_schedule*` constructors and the look-up by name. Leaves to others: the formulas
(`schedule_factors.py`), adapting to a metric (`greedy.py`), Adafactor's internal rate (`adafactor.py`), what a run's
arguments mean (`build.py`).

A factor is a `functools.partial` of a module-level function, so that a scheduler pickles and its `state_dict` has the
shape that other implementations of these names write.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from trainwright.names import SchedulerType, closest
from trainwright.optim.greedy import GreedyLR
from trainwright.optim.schedule_factors import (
    constant_factor,
    constant_with_warmup_factor,
    cosine_factor,
    cosine_with_hard_restarts_factor,
    cosine_with_min_lr_and_warmup_rate_factor,
    inverse_sqrt_factor,
    linear_factor,
    polynomial_decay_factor,
    warmup_stable_decay_factor,
)


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> LambdaLR:
    """The base learning rate throughout."""
    return LambdaLR(optimizer, constant_factor, last_epoch=last_epoch)


def get_constant_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    """A linear rise from 0 over `num_warmup_steps` updates, then the base learning rate."""
    factor = partial(constant_with_warmup_factor, num_warmup_steps=num_warmup_steps)
    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """A linear rise from 0 over `num_warmup_steps` updates, then a linear fall to 0 at `num_training_steps`."""
    factor = partial(linear_factor, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps)
    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5, last_epoch: int = -1
) -> LambdaLR:
    """Warmup, then `num_cycles` turns of a cosine; the default half turn falls from the base rate to 0."""
    factor = partial(
        cosine_factor, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps, num_cycles=num_cycles
    )
    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: int = 1, last_epoch: int = -1
) -> LambdaLR:
    """Warmup, then `num_cycles` half cosines, each falling from the base rate to 0 and starting afresh."""
    factor = partial(
        cosine_with_hard_restarts_factor,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=num_cycles,
    )
    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Warmup, then a fall to `lr_end` along a polynomial of degree `power`.

    `lr_end` is a learning rate, not a factor; it must be below the rate the optimizer was built with (ValueError).
    """
    lr_init = optimizer.defaults["lr"]
    if not lr_init > lr_end:
        raise ValueError(
            f"lr_end={lr_end} must lie below the initial learning rate {lr_init}: the schedule falls to it."
        )
    factor = partial(
        polynomial_decay_factor,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        lr_end=lr_end,
        power=power,
        lr_init=lr_init,
    )
    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


def get_inverse_sqrt_schedule(
    optimizer: Optimizer, num_warmup_steps: int, timescale: int | None = None, last_epoch: int = -1
) -> LambdaLR:
    """Warmup, then a fall as one over the square root of the update; `timescale` defaults to the warmup, or 10,000."""
    factor = partial(
        inverse_sqrt_factor,
        num_warmup_steps=num_warmup_steps,
        timescale=timescale if timescale is not None else num_warmup_steps or 10_000,
    )
    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


def get_reduce_on_plateau_schedule(optimizer: Optimizer, **kwargs: Any) -> ReduceLROnPlateau:
    """torch's `ReduceLROnPlateau`: it is stepped with a metric after an evaluation, not after an update."""
    # lr <- max(lr * factor, min_lr)            after more than `patience` evaluations in a row without a new best
    return ReduceLROnPlateau(optimizer, **kwargs)


def get_greedy_schedule(optimizer: Optimizer, **kwargs: Any) -> GreedyLR:
    """`GreedyLR`: it is stepped with a metric after an evaluation, not after an update."""
    return GreedyLR(optimizer, **kwargs)


def _min_lr_rate(optimizer: Optimizer, min_lr: float | None, min_lr_rate: float | None) -> float:
    if min_lr is not None and min_lr_rate is not None:
        raise ValueError(f"Only one of min_lr={min_lr} and min_lr_rate={min_lr_rate} can be set: both name the floor.")
    if min_lr is not None:
        return float(min_lr / optimizer.defaults["lr"])
    if min_lr_rate is None:
        raise ValueError(
            "This schedule needs its floor: set min_lr (a learning rate) or min_lr_rate (a factor of the base rate), "
            'for instance lr_scheduler_kwargs={"min_lr_rate": 0.1}.'
        )
    return min_lr_rate


def get_cosine_with_min_lr_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> LambdaLR:
    """Warmup, then a cosine down to `min_lr` (a learning rate) or `min_lr_rate` (a factor); exactly one of them."""
    factor = partial(
        cosine_factor,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=num_cycles,
        min_lr_rate=_min_lr_rate(optimizer, min_lr, min_lr_rate),
    )
    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


def get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> LambdaLR:
    """The same, with a warmup that starts at `warmup_lr_rate` of the base rate instead of 0."""
    factor = partial(
        cosine_with_min_lr_and_warmup_rate_factor,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=num_cycles,
        min_lr_rate=_min_lr_rate(optimizer, min_lr, min_lr_rate),
        warmup_lr_rate=warmup_lr_rate,
    )
    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_decay_steps: int,
    num_training_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    """Warmup, a stable stretch at the base rate, a decay to `min_lr_ratio` of it, and that rate from then on.

    `num_stable_steps` follows from `num_training_steps` where it is not given; one of the two is needed (ValueError).
    `warmup_type` and `decay_type` are "linear", "cosine" or "1-sqrt".
    """
    if num_stable_steps is None:
        if num_training_steps is None:
            raise ValueError(
                "A warmup_stable_decay schedule needs num_training_steps or num_stable_steps; both are None."
            )
        num_stable_steps = num_training_steps - num_warmup_steps - num_decay_steps
    elif num_training_steps is not None:
        warnings.warn(
            f"num_stable_steps={num_stable_steps} wins over num_training_steps={num_training_steps}, "
            "so the schedule may end before or after the run does.",
            UserWarning,
            stacklevel=2,
        )
    edges = ("linear", "cosine", "1-sqrt")
    for argument, value in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if value not in edges:
            raise ValueError(f"{argument}={value!r} is unknown; choose one of {edges}.{closest(value, edges)}")
    factor = partial(
        warmup_stable_decay_factor,
        num_warmup_steps=num_warmup_steps,
        num_stable_steps=num_stable_steps,
        num_decay_steps=num_decay_steps,
        warmup_type=warmup_type,
        decay_type=decay_type,
        min_lr_ratio=min_lr_ratio,
        num_cycles=num_cycles,
    )
    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


SCHEDULES: dict[SchedulerType, Callable[..., Any]] = {
    SchedulerType.LINEAR: get_linear_schedule_with_warmup,
    SchedulerType.COSINE: get_cosine_schedule_with_warmup,
    SchedulerType.COSINE_WITH_RESTARTS: get_cosine_with_hard_restarts_schedule_with_warmup,
    SchedulerType.POLYNOMIAL: get_polynomial_decay_schedule_with_warmup,
    SchedulerType.CONSTANT: get_constant_schedule,
    SchedulerType.CONSTANT_WITH_WARMUP: get_constant_schedule_with_warmup,
    SchedulerType.INVERSE_SQRT: get_inverse_sqrt_schedule,
    SchedulerType.REDUCE_ON_PLATEAU: get_reduce_on_plateau_schedule,
    SchedulerType.COSINE_WITH_MIN_LR: get_cosine_with_min_lr_schedule_with_warmup,
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    SchedulerType.WARMUP_STABLE_DECAY: get_wsd_schedule,
    SchedulerType.GREEDY: get_greedy_schedule,
}
# Schedules that take every keyword of a class, so that the class says which keywords exist.
_KEYWORDS_OF: dict[SchedulerType, type] = {
    SchedulerType.REDUCE_ON_PLATEAU: ReduceLROnPlateau,
    SchedulerType.GREEDY: GreedyLR,
}


def waits_for_metric(scheduler: Any) -> bool:
    """Whether `scheduler` steps on a metric after an evaluation, not after an update."""
    return isinstance(scheduler, (ReduceLROnPlateau, GreedyLR))


def get_scheduler(
    name: str | SchedulerType,
    optimizer: Optimizer,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> LRScheduler | GreedyLR:
    """Build the schedule called `name`.

    `num_warmup_steps` and `num_training_steps` are updates; each is passed to the schedules that have room for it and
    is an error where they need it and it is None. `scheduler_specific_kwargs` are the schedule's own arguments; one it
    does not know is an error that lists those it does.
    """
    kind = SchedulerType(name)
    build = SCHEDULES[kind]
    parameters = inspect.signature(_KEYWORDS_OF.get(kind, build)).parameters
    specific = dict(scheduler_specific_kwargs or {})
    allowed = [p for p in parameters if p not in ("optimizer", "num_warmup_steps", "num_training_steps")]
    for key in specific:
        if key not in allowed:
            raise ValueError(
                f"The schedule {kind.value!r} has no argument {key!r} (lr_scheduler_kwargs); it takes {allowed}."
                f"{closest(key, allowed)}"
            )
    counts = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    given = {key: value for key, value in counts.items() if key in parameters and value is not None} | specific
    required = [
        key for key, p in parameters.items() if p.default is p.empty and key != "optimizer" and key not in given
    ]
    if required:
        remedy = "lr_scheduler_kwargs" if required[0] in allowed else "get_scheduler"
        raise ValueError(f"The schedule {kind.value!r} requires `{required[0]}`; pass it in {remedy}.")
    schedule: LRScheduler | GreedyLR = build(optimizer, **given)
    return schedule
