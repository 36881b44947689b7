"""Several runs over each other: their curves, their results, the settings that differ.

Owns: what is compared, as rows and as one HTML file. Leaves to others: reading a run (`run_history`), the look of
a page (`page`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainwright.report.history import Curve, Panel, label_of, panels_of, phase_in
from trainwright.report.html import key_numbers
from trainwright.report.page import Figure, figures_html, number_text, page, table
from trainwright.report.run_history import RunHistory, read_history
from trainwright.safe_write import write_text

COMPARISON_NAME = "comparison.html"
RESULTS = ("steps", "epochs", "duration", "throughput")  # of `key_numbers`, and what begins with "best"
FACTS = ("model", "num_parameters", "num_trainable_parameters", "device", "num_processes", "seed")
UNKNOWN = "?"  # of a run that did not record what it is


class ComparedRun(NamedTuple):
    """A run and what it is called here: the shortest end of its path that no other one has."""

    name: str
    history: RunHistory


def read_runs(directories: Sequence[str]) -> list[ComparedRun]:
    """The runs in `directories`. Errors as `read_history`."""
    return [ComparedRun(name, read_history(path)) for name, path in zip(short_names(directories), directories)]


def short_names(paths: Sequence[str]) -> list[str]:
    """
    >>> short_names(["out/a", "out/b/"]), short_names(["one/run", "two/run"])
    (['a', 'b'], ['one/run', 'two/run'])
    """
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    depth = 1
    while len({tuple(one[-depth:]) for one in parts}) < len(set(map(tuple, parts))):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]


def results(runs: Sequence[ComparedRun]) -> list[list[Any]]:
    """A header, and a row for each run: how far it came, its best value, its cost; None where it has no such number."""
    numbers = [key_numbers(run.history) for run in runs]
    every = dict.fromkeys(name for one in numbers for name in one)
    names = [name for name in every if name in RESULTS or name.startswith("best ")]
    return [["run", *names], *([run.name, *map(one.get, names)] for run, one in zip(runs, numbers))]


def differences(runs: Sequence[ComparedRun]) -> list[list[str]]:
    """A header, and a row for each setting, version or fact that is not the same in all runs."""
    described = [_described(run.history.about) for run in runs]
    rows = [["", *(run.name for run in runs)]]
    for name in dict.fromkeys(name for one in described if one for name in one):
        absent = "(default)" if name not in FACTS and not name.endswith(" version") else "-"
        values = [UNKNOWN if one is None else one.get(name, absent) for one in described]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return rows


def _described(about: Mapping[str, Any]) -> dict[str, str] | None:
    if not about:
        return None
    parts: list[tuple[str, Any]] = [(name, about[name]) for name in FACTS if about.get(name) is not None]
    for kind, ending in (("settings", ""), ("versions", " version")):
        values = about.get(kind)
        if isinstance(values, Mapping):
            parts += [(f"{name}{ending}", value) for name, value in values.items()]
    return {name: value if isinstance(value, str) else number_text(value) for name, value in parts}


def panels_of_runs(runs: Sequence[ComparedRun]) -> list[Panel]:
    """A panel for each value that was logged, with a curve for each run; empty for one that lacks it, so that a
    run has the same colour everywhere.
    """
    curves: dict[str, dict[int, Curve]] = {}
    for index, run in enumerate(runs):
        for panel in panels_of(run.history.lines):
            for curve in panel.curves:
                if phase_in(curve.name, "time_") is None:
                    curves.setdefault(curve.name, {})[index] = curve
    return [
        Panel(
            label_of(name),
            [
                Curve(run.name, of_run[i].steps, of_run[i].values) if i in of_run else Curve(run.name, [], [])
                for i, run in enumerate(runs)
            ],
        )
        for name, of_run in curves.items()
    ]


def comparison_page(runs: Sequence[ComparedRun]) -> str:
    panels = panels_of_runs(runs)
    steps = [step for panel in panels for curve in panel.curves for step in curve.steps]
    figures = [Figure(panel, [run.name for run in runs]) for panel in panels]
    result_header, *result_rows = results(runs)
    header, *rows = differences(runs)
    shown = table(header, rows, kind="words") if rows else '<p class="none">None that was recorded.</p>'
    body = (
        f"<h2>Results</h2>\n{table(result_header, result_rows)}\n"
        f"<h2>Settings that differ</h2>\n{shown}\n"
        f"<h2>Curves</h2>\n{figures_html(figures, min(steps, default=0), max(steps, default=0))}\n"
    )
    return page("Comparison of runs", {}, body, about=", ".join(run.name for run in runs), figures=figures)


def write_comparison(path: str | os.PathLike[str], runs: Sequence[ComparedRun]) -> Path:
    """Write the page into the file `path`; returns it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, comparison_page(runs))
    return path


def comparison_text(runs: Sequence[ComparedRun]) -> str:
    """Results and differences as aligned columns."""
    rows = differences(runs)
    shown = _columns(rows) if len(rows) > 1 else "  none that was recorded"
    return f"{_columns(results(runs))}\n\nSettings that differ:\n{shown}"


def _columns(rows: Iterable[Sequence[Any]]) -> str:
    cells = [["-" if cell is None else number_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in cells)
