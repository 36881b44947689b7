"""The formulas of the learning-rate schedules: update -> factor of the base learning rate.

Owns: one pure function per formula, with the formula and its domain above the code. Leaves to others: building
schedulers out of them (`schedules.py`).

`step` counts optimizer updates from 0. W, S, D and T are the numbers of warmup, stable, decay and all updates, c is
`num_cycles`, m the floor as a factor, p the progress after warmup. Module-level functions, so that a scheduler pickles.
"""

from __future__ import annotations

import math


def _warmup(step: int, num_warmup_steps: int) -> float:
    # step / W                                                                        0 <= step < W
    return step / max(1, num_warmup_steps)


def _progress(step: int, num_warmup_steps: int, num_training_steps: int) -> float:
    # p = (step - W) / (T - W); 0 at the end of warmup, 1 at the end of training, above 1 after it    (step >= W)
    return (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)


def constant_factor(step: int) -> float:
    # 1                                                                               step >= 0
    return 1.0


def constant_with_warmup_factor(step: int, *, num_warmup_steps: int) -> float:
    # step / W                                                                        step < W
    # 1                                                                               step >= W
    return _warmup(step, num_warmup_steps) if step < num_warmup_steps else 1.0


def linear_factor(step: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
    # step / W                                                                        step < W
    # (T - step) / (T - W)                                                            W <= step <= T
    # 0                                                                               step > T
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    return max(0.0, (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps))


def cosine_factor(
    step: int, *, num_warmup_steps: int, num_training_steps: int, num_cycles: float, min_lr_rate: float = 0.0
) -> float:
    # step / W                                                                        step < W
    # m + (1 - m) * (1 + cos(2 pi c p)) / 2                                           step >= W
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    progress = _progress(step, num_warmup_steps, num_training_steps)
    return _above(min_lr_rate, (1.0 + math.cos(2.0 * math.pi * num_cycles * progress)) / 2.0)


def cosine_with_hard_restarts_factor(
    step: int, *, num_warmup_steps: int, num_training_steps: int, num_cycles: int
) -> float:
    # step / W                                                                        step < W
    # (1 + cos(pi * frac(c p))) / 2                                                   W <= step < T
    # 0                                                                               step >= T
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    progress = _progress(step, num_warmup_steps, num_training_steps)
    return 0.0 if progress >= 1.0 else (1.0 + math.cos(math.pi * (num_cycles * progress % 1.0))) / 2.0


def polynomial_decay_factor(
    step: int, *, num_warmup_steps: int, num_training_steps: int, lr_end: float, power: float, lr_init: float
) -> float:
    # step / W                                                                        step < W
    # (lr_end + (lr_init - lr_end) * (1 - p) ** power) / lr_init                      W <= step <= T
    # lr_end / lr_init                                                                step > T
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    if step > num_training_steps:
        return lr_end / lr_init
    remaining = 1.0 - _progress(step, num_warmup_steps, num_training_steps)
    decayed: float = (lr_init - lr_end) * remaining**power + lr_end
    return decayed / lr_init


def inverse_sqrt_factor(step: int, *, num_warmup_steps: int, timescale: int) -> float:
    # step / W                                                                        step < W
    # 1 / sqrt(1 + (step - W) / timescale)                                            step >= W
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    return 1.0 / math.sqrt((step + timescale - num_warmup_steps) / timescale)


def cosine_with_min_lr_and_warmup_rate_factor(
    step: int,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float,
    min_lr_rate: float = 0.0,
    warmup_lr_rate: float | None = None,
) -> float:
    # Here warmup reaches 1 at its last step instead of one step after it, so the very first step already learns.
    # (step + 1) / W                                                                  step < W, warmup_lr_rate is None
    # r + (1 - r) * step / (W - 1)                                                    step < W, r = warmup_lr_rate
    # m + (1 - m) * (1 + cos(2 pi c q)) / 2                step >= W, q = (step - W + 1) / (T - W)
    if step < num_warmup_steps:
        if warmup_lr_rate is None:
            return (step + 1.0) / max(1.0, num_warmup_steps)
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * step / max(1, num_warmup_steps - 1)
    progress = _progress(step + 1, num_warmup_steps, num_training_steps)
    return _above(min_lr_rate, (1.0 + math.cos(2.0 * math.pi * num_cycles * progress)) / 2.0)


def _rising_edge(kind: str, progress: float) -> float:
    # linear: p        cosine: (1 - cos(pi p)) / 2        1-sqrt: 1 - sqrt(1 - p)    (0 <= p <= 1)
    if kind == "linear":
        return progress
    if kind == "cosine":
        return (1.0 - math.cos(math.pi * progress)) / 2.0
    return 1.0 - math.sqrt(1.0 - progress)


def warmup_stable_decay_factor(
    step: int,
    *,
    num_warmup_steps: int,
    num_stable_steps: int,
    num_decay_steps: int,
    warmup_type: str,
    decay_type: str,
    min_lr_ratio: float,
    num_cycles: float,
) -> float:
    # m + (1 - m) * rise(step / W)                                                    step < W
    # 1                                                                               W <= step < W + S
    # m + (1 - m) * fall((step - W - S) / D)                                          W + S <= step < W + S + D
    # m                                                                               step >= W + S + D
    # with fall(p) = rise(1 - p), except that a falling cosine turns c times: (1 + cos(2 pi c p)) / 2
    if step < num_warmup_steps:
        return _above(min_lr_ratio, _rising_edge(warmup_type, _warmup(step, num_warmup_steps)))
    if step < num_warmup_steps + num_stable_steps:
        return 1.0
    if step >= num_warmup_steps + num_stable_steps + num_decay_steps:
        return min_lr_ratio
    progress = (step - num_warmup_steps - num_stable_steps) / max(1, num_decay_steps)
    if decay_type == "cosine":
        return _above(min_lr_ratio, (1.0 + math.cos(2.0 * math.pi * num_cycles * progress)) / 2.0)
    return _above(min_lr_ratio, _rising_edge(decay_type, 1.0 - progress))


def _above(floor: float, factor: float) -> float:
    # floor + (1 - floor) * factor                                                    0 <= factor <= 1
    return max(0.0, factor * (1.0 - floor) + floor)
