"""One HTML file about a run: what it is, its key numbers, its curves, evaluations and checkpoints.

Owns: what that page says, and in which order. Leaves to others: which curves there are (`history`), where the values
come from (`run_history`), the look of its pieces (`page`).
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trainwright.checkpoint.best import Listed, list_run
from trainwright.names import REPORT_NAME
from trainwright.report.history import (
    Best,
    best_of,
    finite,
    is_eval_loss,
    label_of,
    metrics_in,
    panels_of,
    time_of_phases,
)
from trainwright.report.metrics_file import LAST_LINE, is_same_run, read_run
from trainwright.report.page import Figure, duration_text, figures_html, keys_html, number_text, page, table
from trainwright.report.run_history import RunHistory, history_of_lines
from trainwright.report.svg import shares_svg
from trainwright.safe_write import write_text

MAX_ROWS = 200  # of the table of evaluations; the last ones are shown


def write_report(
    output_dir: str | os.PathLike[str], log_history: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> Path:
    """Write `training_report.html` into `output_dir` and return its path.

    summary: key numbers by name, in the order to show them; `"title"` is the heading of the page. What the run is, and
    its warnings, come from `metrics.jsonl` there, if that is of the same run.
    """
    try:
        found = read_run(output_dir)
    except (ValueError, OSError):
        found = None
    is_known = found is not None and is_same_run(found.lines, log_history)
    about, warnings = (found.about, found.warnings) if found is not None and is_known else ({}, [])
    history = RunHistory(log_history, {}, [], about, warnings, best_of(log_history, about.get("metric")))
    return _write(output_dir, _page(history, _checkpoints_in(output_dir), summary=summary))


def write_run_report(
    run_dir: str | os.PathLike[str], history: RunHistory | None = None, *, is_running: bool = False
) -> Path:
    """Write the page about the run in `run_dir`; returns its path. Without a `history`, that of `metrics.jsonl`."""
    return _write(run_dir, run_page(run_dir, history, is_running=is_running))


def run_page(
    run_dir: str | os.PathLike[str],
    history: RunHistory | None = None,
    *,
    is_running: bool = False,
    is_watched: bool = False,
) -> str:
    """The page about the run in `run_dir`, as text."""
    if history is None:
        history = history_of_lines(read_run(run_dir))
    name = os.path.basename(os.path.abspath(run_dir))
    checkpoints = _checkpoints_in(run_dir)
    return _page(history, checkpoints, fallback_name=name, is_running=is_running, is_watched=is_watched)


def _write(output_dir: str | os.PathLike[str], text: str) -> Path:
    path = Path(output_dir) / REPORT_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def _checkpoints_in(run_dir: str | os.PathLike[str]) -> list[Listed]:
    try:
        return list_run(run_dir)
    except (OSError, ValueError):  # one is being deleted, or the directory cannot be read
        return []


def _page(
    history: RunHistory,
    checkpoints: Sequence[Listed],
    *,
    summary: Mapping[str, Any] | None = None,
    fallback_name: str = "Training report",
    is_running: bool = False,
    is_watched: bool = False,
) -> str:
    lines, about, best = history.lines, history.about, history.best
    panels = panels_of(lines)
    steps = [step for panel in panels for curve in panel.curves for step in curve.steps]
    figures = [Figure.of(panel, best) for panel in panels]
    title, numbers = str(about.get("name") or fallback_name), key_numbers(history)
    if summary is not None:
        title = str(summary.get("title", title))
        numbers = {**{name: value for name, value in summary.items() if name != "title"}, **_facts(about)}
    body = (
        f"{_warnings(history.warnings)}{_time(lines)}"
        f"<h2>Curves</h2>\n{figures_html(figures, min(steps, default=0), max(steps, default=0))}\n"
        f"<h2>Evaluations</h2>\n{_evaluations(lines, best)}\n{_checkpoints(checkpoints)}{_settings(about)}"
    )
    return page(title, numbers, body, about=_status(history, is_running), figures=figures, is_watched=is_watched)


def key_numbers(history: RunHistory) -> dict[str, Any]:
    """The key numbers of a run by name, in the order to show them."""
    numbers = dict(history.summary)
    if history.best is not None:
        best = history.best
        numbers[_best_label(best)] = f"{number_text(best.value)} at step {best.step:,}"
    if seconds := duration_s(history):
        numbers["duration"] = duration_text(seconds)
    ends = [line for line in history.lines if LAST_LINE in line]
    if ends and (speed := finite(ends[-1].get("train_samples_per_second"))):
        numbers["throughput"] = f"{number_text(speed)} samples/s"
    return {**numbers, **_facts(history.about)}


def _best_label(best: Best) -> str:
    label = label_of(best.name)
    return f"best {label.lower() if label[1:].islower() else label}"  # not of an abbreviation, such as F1


def _facts(about: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if about.get("device"):
        num = about.get("num_processes", 1)
        facts["device"] = f"{num} x {about['device']}" if isinstance(num, int) and num > 1 else about["device"]
    if about.get("model"):
        facts["model"] = about["model"]
    total, trained = about.get("num_parameters"), about.get("num_trainable_parameters")
    if isinstance(total, int):
        is_part = isinstance(trained, int) and trained != total
        facts["parameters"] = f"{total:,}, of which {trained:,} are trained" if is_part else total
    if "seed" in about:
        facts["seed"] = str(about["seed"])
    return facts


def duration_s(history: RunHistory) -> float | None:
    """Seconds of the run so far: `train_runtime`, or from its start to its last line, pauses included."""
    for line in reversed(history.lines):
        if (seconds := finite(line.get(LAST_LINE))) is not None:
            return seconds
    times = [number for line in history.lines if (number := finite(line.get("time"))) is not None]
    start = finite(history.about.get("started"))
    start = start if start is not None else min(times, default=None)
    return None if start is None or not times else max(times[-1] - start, 0.0) or None


def _status(history: RunHistory, is_running: bool) -> str:
    lines = history.lines
    times = [number for line in lines if (number := finite(line.get("time"))) is not None]
    parts = []
    if (start := finite(history.about.get("started"))) is not None:
        parts.append(f"started {_date(start)}")
    if is_running:
        parts.append("running")
    elif any(LAST_LINE in line and line.get("step") == lines[-1].get("step") for line in lines):
        parts.append("finished")
    elif lines:
        parts.append("has not reached its end")
    if times:
        parts.append(f"last log line {_date(times[-1])}")
    return ", ".join(parts)


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "at an unknown time"


def _warnings(texts: Sequence[str]) -> str:
    if not texts:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    count = f"{len(texts)} warning{'s' if len(texts) > 1 else ''}"
    return f'<details class="warnings" open><summary>{count} of this run</summary><ul>{items}</ul></details>\n'


def _time(log_history: Sequence[Mapping[str, Any]]) -> str:
    """The time by phase, as a bar and its numbers; nothing where the run did not measure it."""
    seconds = time_of_phases(log_history)
    if not seconds:
        return ""
    total = sum(seconds.values())
    keys = keys_html(f"{part} {value / total:.1%} ({number_text(value)} s)" for part, value in seconds.items())
    bar = shares_svg(seconds, "Where the time went")
    return f"<h2>Where the time went</h2>\n<figure>{bar}{keys}</figure>\n"


def _evaluations(log_history: Sequence[Mapping[str, Any]], best: Best | None) -> str:
    """One row per step that was evaluated; several datasets of a step share its row."""
    rows: dict[Any, dict[str, Any]] = {}
    names: dict[str, None] = {}  # an ordered set
    for line in log_history:
        shown = [name for name in line if is_eval_loss(name)] + metrics_in(line)
        if shown and isinstance(line.get("step"), int):
            rows.setdefault(line["step"], {"epoch": line.get("epoch")}).update({name: line[name] for name in shown})
            names.update(dict.fromkeys(shown))
    if not rows:
        return '<p class="none">No evaluation was run.</p>'
    header = ("Step", "Epoch", *map(label_of, names))
    last = list(rows.items())[-MAX_ROWS:]
    shown_rows = [(step, *(row.get(name) for name in ("epoch", *names))) for step, row in last]
    note = f'<p class="none">The last {MAX_ROWS} of {len(rows)}.</p>' if len(rows) > MAX_ROWS else ""
    marked = next((i for i, (step, _) in enumerate(last) if best and best.name in names and step == best.step), None)
    if marked is not None and best is not None:
        note = f'<p class="none">Marked: the {html.escape(_best_label(best))}.</p>{note}'
    return f"{note}{table(header, shown_rows, best=marked)}"


def _checkpoints(found: Sequence[Listed]) -> str:
    if not found:
        return ""
    rows = [(one.name, f"{one.num_bytes / 2**20:,.1f} MiB", " ".join(one.marks)) for one in found]
    best = next((index for index, one in enumerate(found) if "best" in one.marks), None)
    return f"<h2>Checkpoints</h2>\n{table(('Name', 'Size', ''), rows, best=best)}\n"


def _settings(about: Mapping[str, Any]) -> str:
    """What differs from the defaults, and versions."""
    text = ""
    for name, heading in (("settings", "Settings that differ from their defaults"), ("versions", "Versions")):
        values = about.get(name)
        if isinstance(values, Mapping) and values:
            rows = [(key, str(value)) for key, value in values.items()]
            text += f"<h2>{heading}</h2>\n{table(('Name', 'Value'), rows, kind='words')}\n"
    return text
