"""Which checkpoint is the best so far: pure decisions about numbers and paths.

Owns: finding the metric, comparing two values, finding the best checkpoint again after its directory moved, and which
of a run's checkpoints are best and last. Leaves to others: when metrics are computed, and remembering the result
(`TrainerState`). Imports no torch.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from trainwright.checkpoint.json_files import read_loop_state, read_trainer_state
from trainwright.checkpoint.layout import (
    Record,
    checkpoint_name,
    linked_checkpoints,
    modified_ns,
    of_earlier_runs,
    oldest_first,
    same_place,
    sort_checkpoints,
    wrote,
)
from trainwright.checkpoint.manifest import how_to_accept, problems
from trainwright.checkpoint.paths import is_ours, relative_files, shown, step_of
from trainwright.names import LOOP_STATE_NAME, TRAINER_STATE_NAME, SaveStrategy, closest

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments
    from trainwright.state import TrainerState

logger = logging.getLogger(__name__)

PREFIX = "eval_"


class MetricNotFound(KeyError, ValueError):
    """`metric_for_best_model` names a metric that the evaluation did not return."""

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0])


class Listed(NamedTuple):
    """One checkpoint of a run."""

    name: str
    num_bytes: int
    metric: str  # the metric that decides on the best, or a loss, with its name; "" where none was logged
    written_s: float  # when, in seconds since 1970
    marks: list[str]  # "best", "last", "DAMAGED", "(an earlier run)", "(a link, not followed)"


def list_run(output_dir: str | os.PathLike[str]) -> list[Listed]:
    """The checkpoints of a run, oldest first, then links; not what others put there.

    The last is the newest (of the run that began last) that is whole by its sizes; it also knows which is the best.
    `problems(path)` reads every byte.
    """
    paths = [path for path in sort_checkpoints(output_dir) if is_ours(path)]
    states = {path: _state_of(path) for path in paths}
    damaged = {path for path, state in states.items() if state is None or problems(path, deep=False)}
    last = next((path for path in reversed(oldest_first(paths)) if path not in damaged), None)
    earlier = of_earlier_runs(paths)
    best = None
    if last is not None:
        best = locate((states[last] or {}).get("best_model_checkpoint"), output_dir)
    found = [
        Listed(
            os.path.basename(path),
            sum(os.lstat(os.path.join(path, name)).st_size for name in relative_files(path)),
            _metric_of(path, states[path] or {}),
            modified_ns(path) / 1e9,
            ["last"] * (path == last)
            + ["best"] * same_place(path, best)
            + ["DAMAGED"] * (path in damaged)
            + ["(an earlier run)"] * (path in earlier),
        )
        for path in paths
    ]
    return found + [
        Listed(os.path.basename(path), 0, "", os.lstat(path).st_mtime, ["(a link, not followed)"])
        for path in linked_checkpoints(output_dir)
    ]


def _state_of(checkpoint: str) -> dict[str, Any] | None:
    """What the trainer state of `checkpoint` holds, nothing where there is none, None where it cannot be used."""
    try:
        return read_trainer_state(os.path.join(checkpoint, TRAINER_STATE_NAME))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError):
        return None


def _metric_of(checkpoint: str, state: Mapping[str, Any]) -> str:
    """ "eval_f1 0.75": what was measured at the step of `checkpoint`, or the last training loss before it."""
    try:
        asked = read_loop_state(os.path.join(checkpoint, LOOP_STATE_NAME)).get("arguments") or {}
    except (ValueError, OSError):
        asked = {}
    names = [*_spellings(str(asked.get("metric_for_best_model") or "loss")), *_spellings("loss")]
    lines = state.get("log_history") or []
    at_step = [line for line in lines if line.get("step") == state.get("global_step")]
    for name, among in [*((name, at_step) for name in names), ("loss", lines)]:
        for line in reversed(among):
            if isinstance(value := line.get(name), (int, float)):
                return f"{shown(name, 40)} {value:.4g}"
    return ""


def has_metric(metrics: Mapping[str, Any], name: str) -> bool:
    """Whether `metrics` have `name`, with or without "eval_"."""
    return any(candidate in metrics for candidate in _spellings(name))


def _spellings(name: str) -> tuple[str, str, str]:
    bare = name.removeprefix(PREFIX)
    return PREFIX + bare, bare, name


def metric_value(metrics: Mapping[str, Any], name: str) -> float:
    """The value of metric `name`, with or without "eval_", as a float.

    Raises MetricNotFound, which is a KeyError and a ValueError, listing what is there and the nearest name.
    """
    bare = name.removeprefix(PREFIX)
    for candidate in _spellings(name):
        if candidate in metrics:
            return float(metrics[candidate])
    raise MetricNotFound(
        f"metric_for_best_model={name!r} is not among the metrics of the evaluation: {sorted(metrics)}."
        f"{closest(PREFIX + bare, metrics) or closest(bare, metrics)} "
        "Return it from compute_metrics, or choose one of these."
    )


def is_better(value: float, best: float | None, greater_is_better: bool, threshold: float = 0.0) -> bool:
    """Whether `value` improves on `best` by more than `threshold`. NaN never does; all else beats None or NaN."""
    if math.isnan(value):
        return False
    if best is None or math.isnan(best):
        return True
    gain = value - best if greater_is_better else best - value
    return gain > threshold


def note_metric(state: TrainerState, args: TrainingArguments, metrics: Mapping[str, Any], *, is_needed: bool) -> bool:
    """Whether `metrics` are the best so far by `metric_for_best_model`; if so, `state` has them and the step.

    Where the metric is not there: MetricNotFound if the run needs it, else False (it was said before the first step).
    """
    name = args.metric_for_best_model
    if name is None or not (is_needed or has_metric(metrics, name)):
        return False
    value = metric_value(metrics, name)
    if not is_better(value, state.best_metric, bool(args.greater_is_better)):
        return False
    state.best_metric = value
    if args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST):
        state.best_global_step = state.global_step
    return True


def best_directory(state: TrainerState, run_dir: str, run: Record | None) -> str | None:
    """Where the best checkpoint is, once that of `state.global_step` is saved into `run_dir`. `run`: that saves it."""
    known = state.best_model_checkpoint
    if state.best_global_step is None:
        return known
    directory = os.path.join(run_dir, checkpoint_name(state.best_global_step))
    is_saved_now = state.best_global_step == state.global_step
    return directory if is_saved_now or was_saved(directory, known, run) else known


def locate(best_path: str | None, *directories: str | os.PathLike[str]) -> str | None:
    """Where the checkpoint remembered as `best_path` is now, or None.

    `best_path` may come from a file, so of it only its name counts, which must be that of a checkpoint; it is looked
    for in `directories`: in the one that `best_path` names, if it is among them, then in their order, since a run that
    was moved or copied remembers the old place. A link is not followed.
    """
    if not best_path or not isinstance(best_path, str):
        return None
    name = best_path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if "\0" in name or step_of(name) is None:
        return None
    named = os.path.dirname(os.path.abspath(best_path))
    ordered = sorted(directories, key=lambda directory: os.path.abspath(directory) != named)
    paths = [os.path.join(os.fspath(directory), name) for directory in ordered]
    return next((path for path in paths if os.path.isdir(path) and not os.path.islink(path)), None)


def was_saved(directory: str, known: str | None, run: Record | None) -> bool:
    """Whether `directory`, whose name has the best step, was saved by this run, or by the one that it continues.

    An earlier run may have left a checkpoint of the same step there. `known`: the best checkpoint so far, where it is
    now (`resumed`). `run`: the record of this run.
    """
    return (known is not None and same_place(known, directory)) or wrote(run, directory)


def resumed(best_path: str | None, checkpoint: str, run_dir: str | os.PathLike[str]) -> str | None:
    """The best checkpoint that `checkpoint` remembers, where it may lie: where `checkpoint` itself does, or in the
    directory of the run. None, with a warning, where it is called as no checkpoint is.

    In this order, because a run that is resumed from another directory may find checkpoints of an earlier run in
    its directory.
    """
    found = locate(best_path, os.path.dirname(os.path.abspath(checkpoint)), run_dir)
    if found is not None or not best_path:
        return found
    name = best_path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if step_of(name) is not None:
        return os.path.join(os.fspath(run_dir), name)  # gone, which is said when it is wanted
    logger.warning("%s names %s as its best checkpoint, which is none, and is not used.", checkpoint, shown(best_path))
    return None


def undamaged(best_path: str | None, *directories: str | os.PathLike[str], then: str | None = None) -> str | None:
    """As `locate`, for reading: None, with a warning that says `then`, where the best checkpoint is gone or damaged."""
    then = then or "the model keeps its last weights"
    path = locate(best_path, *directories)
    if path is None:
        logger.warning("The best checkpoint, %s, is gone; %s.", shown(best_path), then)
        return None
    damage = problems(path)
    if damage:
        logger.warning(
            "THE BEST CHECKPOINT %s IS DAMAGED; %s: %s.%s", path, then, "; ".join(damage), how_to_accept(path)
        )
        return None
    return path
