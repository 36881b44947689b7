"""The trials of a hyper-parameter search, as a table.

Owns: `TrialRecord`, the same for every engine, the text table and the CSV file. Leaves to others: the engines, which
fill the records (`search/`, one file each), and the page with pictures (`search_page`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainwright.safe_write import write_text

TRIALS_NAME = "search_trials.csv"
MAX_ROWS = 50  # of the text table, the best trials first; the file has all


class TrialRecord(NamedTuple):
    """One trial: `state` is "complete", "pruned", "failed" or "running"; `values` has one number per direction."""

    trial: str
    state: str
    values: tuple[float, ...]  # empty where the trial has no result
    params: dict[str, Any]
    duration_s: float | None = None  # None: not over, or not measured


def best_first(records: Sequence[TrialRecord], directions: Sequence[str]) -> list[TrialRecord]:
    """`records` by their first value, those without a result last, in the order of their trials."""
    sign = -1.0 if directions[0] == "maximize" else 1.0
    complete = [record for record in records if record.state == "complete"]
    others = [record for record in records if record.state != "complete"]
    return sorted(complete, key=lambda record: sign * record.values[0]) + others


def objective_names(directions: Sequence[str]) -> list[str]:
    """
    >>> objective_names(["minimize"]), objective_names(["minimize", "maximize"])
    (['objective'], ['objective_0', 'objective_1'])
    """
    return ["objective"] if len(directions) == 1 else [f"objective_{index}" for index in range(len(directions))]


def rows_of(records: Sequence[TrialRecord], directions: Sequence[str]) -> list[list[Any]]:
    """A header, and one row per record; a trial without a value or without a hyper-parameter has None there."""
    objectives = objective_names(directions)
    params = list(dict.fromkeys(name for record in records for name in record.params))
    rows: list[list[Any]] = [["trial", "state", *objectives, *params, "duration_s"]]
    for record in records:
        values = [record.values[index] if index < len(record.values) else None for index in range(len(objectives))]
        given = [record.params.get(name) for name in params]
        rows.append([record.trial, record.state, *values, *given, record.duration_s])
    return rows


def text_table(records: Sequence[TrialRecord], directions: Sequence[str]) -> str:
    """The trials as aligned columns, best first.

    >>> print(text_table([TrialRecord("0", "complete", (0.5,), {"lr": 0.1}, 2.0)], ["minimize"]))
      trial  state     objective  lr   duration_s
      0      complete  0.5        0.1  2
    """
    header, *rows = rows_of(best_first(records, directions), directions)
    cells = [[str(name) for name in header], *([_cell(value) for value in row] for row in rows[:MAX_ROWS])]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in cells]
    if len(rows) > MAX_ROWS:
        lines.append(f"  and {len(rows) - MAX_ROWS} more, in {TRIALS_NAME}")
    return "\n".join(lines)


def write_csv(output_dir: str | Path, records: Sequence[TrialRecord], directions: Sequence[str]) -> Path:
    """Write `search_trials.csv` into `output_dir`, in the order of the trials. Returns its path."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows_of(records, directions))
    path = Path(output_dir) / TRIALS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
    return path


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
