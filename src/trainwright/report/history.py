"""A log history as curves.

Owns: which entries of `TrainerState.log_history` belong to which curve, and their names for people. Leaves to others:
drawing (`curve`, `html`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# What an evaluation reports about its own cost.
COST_SUFFIXES = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


# Of `log_speed`: three measures of one thing, of which a page draws the first that was logged.
SPEEDS = ("tokens_per_second", "samples_per_second", "steps_per_second")
LARGEST_DRAWN = 1e300  # of a value: differences and margins of larger ones are infinite
MOST_PHASES = 6  # curves of one panel that can still be distinguished


class Curve(NamedTuple):
    """One line of a figure: finite `values` over `steps` (updates), both of the same length."""

    name: str
    steps: list[int]
    values: list[float]


class Panel(NamedTuple):
    """Curves that share a vertical axis; `title` says of what."""

    title: str
    curves: list[Curve]


class Best(NamedTuple):
    """The best value of the metric that a run is judged by: its name, the value, the step (updates) that has it."""

    name: str
    value: float
    step: int


def curves_of(log_history: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Name -> curve, for every finite number in the log lines that carry a step."""
    curves: dict[str, Curve] = {}
    for line in log_history:
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if name != "step" and (number := finite(value)) is not None:
                curve = curves.setdefault(name, Curve(name, [], []))
                curve.steps.append(step)
                curve.values.append(number)
    return curves


def finite(value: Any) -> float | None:
    """`value` where it is a number that can be drawn, else None.

    >>> finite(2), finite(float("nan")), finite(10**400), finite("2")
    (2.0, None, None, None)
    """
    if not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= LARGEST_DRAWN else None


def panels_of(log_history: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """The panels to draw: losses, each evaluation metric, learning rate, gradient norm, throughput, time by phase.

    Training loss and the losses of all evaluation datasets share a panel. What is no finite number is left out, and so
    is a panel without values.
    """
    curves = curves_of(log_history)
    speed = next((name for name in SPEEDS if name in curves), "")
    losses = [curve for name, curve in curves.items() if name == "loss" or is_eval_loss(name)]
    panels = [Panel("Loss", losses)] if losses else []
    for name in (*metrics_in(curves), "learning_rate", "grad_norm", speed, "mfu"):
        if name in curves:
            panels.append(Panel(label_of(name), [curves[name]]))
    phases = [curve for name, curve in curves.items() if phase_in(name, "time_") and any(curve.values)]
    if phases:
        phases.sort(key=lambda curve: -sum(curve.values))
        panels.append(Panel("Seconds between two log lines", phases[:MOST_PHASES]))
    return panels


def best_of(log_history: Iterable[Mapping[str, Any]], metric: str | None, rises: bool | None = None) -> Best | None:
    """The best value of `metric` (`metric_for_best_model`, "eval_" may be left out), else of the validation loss.

    `rises`: whether larger is better; None: unless its name ends in "loss". None where no such value was logged.
    """
    curves = curves_of(log_history)
    wanted = metric or "loss"
    # The prefix is that of an evaluation: "loss" alone is the validation loss here, as in `metric_for_best_model`.
    name = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    curve = curves.get(name) or (curves.get(wanted) if metric and metric != "loss" else None)
    if curve is None:
        return None
    rises = not name.endswith("loss") if rises is None else rises
    value = max(curve.values) if rises else min(curve.values)
    return Best(curve.name, value, curve.steps[curve.values.index(value)])


def time_of_phases(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the whole run by phase, longest first, without those that took no time; empty without
    `time_breakdown`.
    """
    totals: dict[str, float] = {}
    for line in log_history:
        whole = {phase: finite(line[name]) or 0.0 for name in line if (phase := phase_in(name, "train_time_"))}
        if whole:  # the line at the end of a run has the totals
            totals = whole
            continue
        for name, value in line.items():
            if phase := phase_in(name, "time_"):
                totals[phase] = totals.get(phase, 0.0) + (finite(value) or 0.0)
    return {phase: seconds for phase, seconds in sorted(totals.items(), key=lambda item: -item[1]) if seconds > 0}


def phase_in(name: str, prefix: str) -> str | None:
    """
    >>> phase_in("train_time_data_s", "train_time_"), phase_in("time_data_s", "time_"), phase_in("loss", "time_")
    ('data', 'data', None)
    """
    return name[len(prefix) : -len("_s")] if name.startswith(prefix) and name.endswith("_s") else None


def metrics_in(names: Iterable[str]) -> list[str]:
    """Those of `names` that measure the model in an evaluation, losses apart."""
    return [
        name
        for name in names
        if name.startswith("eval_") and not is_eval_loss(name) and not name.endswith(COST_SUFFIXES)
    ]


def is_eval_loss(name: str) -> bool:
    return name.startswith("eval_") and name.endswith("_loss")


def label_of(name: str) -> str:
    """The name of a logged value for people.

    >>> label_of("loss"), label_of("eval_loss"), label_of("eval_dev_loss"), label_of("eval_f1"), label_of("grad_norm")
    ('Training loss', 'Validation loss', 'Validation loss (dev)', 'F1', 'Gradient norm')
    """
    known = {
        "loss": "Training loss",
        "eval_loss": "Validation loss",
        "grad_norm": "Gradient norm",
        "mfu": "Share of the device's peak (MFU)",
    }
    if name in known:
        return known[name]
    if is_eval_loss(name):
        return f"Validation loss ({name[len('eval_') : -len('_loss')]})"
    text = (phase_in(name, "time_") or name.removeprefix("eval_")).replace("_", " ")
    return text[:1].upper() + text[1:]


def thinned(curve: Curve, num_points: int) -> Curve:
    """At most about `num_points` points of `curve` that look the same: the lowest and the highest of each stretch.

    Keeping every n-th point instead would hide the spikes that one looks for.
    """
    if len(curve.steps) <= num_points:
        return curve
    stretch = math.ceil(2 * len(curve.steps) / num_points)
    kept = sorted({0, len(curve.steps) - 1, *_extremes(curve.values, stretch)})
    return Curve(curve.name, [curve.steps[index] for index in kept], [curve.values[index] for index in kept])


def _extremes(values: Sequence[float], stretch: int) -> Iterable[int]:
    for start in range(0, len(values), stretch):
        indices = range(start, min(start + stretch, len(values)))
        yield min(indices, key=values.__getitem__)
        yield max(indices, key=values.__getitem__)
