"""What the files of a run's directory say of its course: `metrics.jsonl`, a trainer state, the newest checkpoint.

Owns: which of them a report shows, and the key numbers that they give. Leaves to others: reading each, drawing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainwright.checkpoint.json_files import read_trainer_state
from trainwright.checkpoint.layout import oldest_first, record_of, sort_checkpoints
from trainwright.checkpoint.manifest import problems
from trainwright.names import METRICS_NAME, TRAINER_STATE_NAME
from trainwright.report.history import Best, best_of, curves_of
from trainwright.report.metrics_file import ID_DIGITS, RunLines, is_same_run, read_run

# A file system may say that a file was written a moment before it was.
CLOCK_S = 2


class RunHistory(NamedTuple):
    """The log lines of a run, its key numbers by name, and which files could not be used, in sentences; what it is
    (`run_facts`, empty where that was not recorded), its warnings, its best value.
    """

    lines: Sequence[Mapping[str, Any]]
    summary: dict[str, Any]
    not_used: list[str]
    about: Mapping[str, Any]
    warnings: Sequence[str]
    best: Best | None


def history_of_lines(run: RunLines, state: Mapping[str, Any] | None = None) -> RunHistory:
    """Of what `metrics.jsonl` holds; `state` is an earlier one of the same run."""
    step, epoch = _end_of(run.lines) if run.lines else (0, None)
    return _history(run.lines, step, epoch, state or {}, run, [])


def _history(
    lines: Sequence[Mapping[str, Any]],
    step: int,
    epoch: Any,
    state: Mapping[str, Any],
    run: RunLines | None,
    wrong: list[str],
) -> RunHistory:
    about: Mapping[str, Any] = run.about if run is not None else {}
    planned = state.get("max_steps") or about.get("max_steps")
    summary = {"steps": f"{step} of {planned}" if planned else str(step), "epochs": epoch}
    best = _best(lines, about, state)
    if best is None:
        summary["best metric"] = state.get("best_metric")
    shown = {name: value for name, value in summary.items() if value is not None}
    return RunHistory(lines, shown, wrong, about, run.warnings if run is not None else [], best)


def _best(lines: Sequence[Mapping[str, Any]], about: Mapping[str, Any], state: Mapping[str, Any]) -> Best | None:
    if about:
        return best_of(lines, about.get("metric"), about.get("greater_is_better"))
    value, step = state.get("best_metric"), state.get("best_global_step")
    if value is None or not isinstance(step, int):
        return best_of(lines, None)
    # A state does not name its metric: it is the one that had this value at this step.
    for curve in curves_of(lines).values():
        if (step, value) in zip(curve.steps, curve.values):
            return Best(curve.name, value, step)
    return None


def read_history(run_dir: str) -> RunHistory:
    """The history of the run that logged last into `run_dir`, as far as it came.

    That is its trainer state, or where that is behind, or there is none, `metrics.jsonl`. Raises ValueError, saying
    what was looked for, where nothing can be used.
    """
    wrong: list[str] = []
    try:
        run = read_run(run_dir)
    except (ValueError, OSError) as error:
        run = RunLines([], {}, [])
        wrong.append(str(error))
    lines = run.lines
    found = _newest_state(run_dir, wrong)
    if found is not None:
        directory, state = found
        history: list[dict[str, Any]] = state.get("log_history") or []
        is_same = _is_of_run(directory, history, lines, is_root=directory == run_dir)
        if not lines or not _is_behind(directory, state, history, lines, is_same=is_same):
            ours = run if is_same else None
            return _history(history, state["global_step"], state.get("epoch"), state, ours, wrong)
        return history_of_lines(run, state if is_same else {})._replace(not_used=wrong)
    if lines:
        return history_of_lines(run)._replace(not_used=wrong)
    if wrong:
        raise ValueError(f"{run_dir} holds no {TRAINER_STATE_NAME} that can be used. {' '.join(wrong)}")
    raise ValueError(f"{run_dir} holds no {TRAINER_STATE_NAME}, nor a checkpoint that does, and no {METRICS_NAME}.")


def _newest_state(run_dir: str, wrong: list[str]) -> tuple[str, dict[str, Any]] | None:
    """(directory, trainer state): that of `run_dir` itself, or of its newest checkpoint that is whole by its sizes."""
    for directory in (run_dir, *reversed(oldest_first(sort_checkpoints(run_dir)))):
        path = os.path.join(directory, TRAINER_STATE_NAME)
        if not os.path.lexists(path):
            continue
        found = problems(directory, deep=False) if directory != run_dir else []
        if not found:
            try:
                return directory, read_trainer_state(path)
            except (ValueError, OSError) as error:
                found = [str(error)]
        wrong.append(f"{directory}: {'; '.join(found)}")
    return None


def _is_of_run(directory: str, history: Sequence[Any], lines: Sequence[Mapping[str, Any]], *, is_root: bool) -> bool:
    """Whether the state in `directory` and the `lines` are of one run."""
    record = None if is_root else record_of(directory)
    if record is not None and lines:
        return lines[-1].get("run_id") == str(record["id"])[:ID_DIGITS]
    return is_same_run(lines, history)


def _is_behind(
    directory: str,
    state: Mapping[str, Any],
    history: Sequence[Any],
    lines: Sequence[Mapping[str, Any]],
    *,
    is_same: bool,
) -> bool:
    """Whether the run went further than `state`, or another one has begun since."""
    step, _ = _end_of(lines)
    logged = lines[-1].get("time")
    written = os.path.getmtime(os.path.join(directory, TRAINER_STATE_NAME))
    later_s = logged - written if isinstance(logged, (int, float)) else 0.0
    if not is_same:
        return later_s > 0
    known = state["global_step"]
    return step > known or (step == known and len(lines) > len(history)) or later_s > CLOCK_S


def _end_of(lines: Sequence[Mapping[str, Any]]) -> tuple[int, Any]:
    """(step, epoch) of the last line."""
    return lines[-1]["step"], lines[-1].get("epoch")
