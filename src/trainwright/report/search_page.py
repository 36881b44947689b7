"""One HTML file about a hyper-parameter search: its trials, the best value so far, each hyper-parameter's effect.

Owns: the look of that file. Leaves to others: the trials (`trials`), style and scales (`page`, `svg`).
"""

from __future__ import annotations

import html
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trainwright.report.history import Curve, Panel, finite
from trainwright.report.page import page, table
from trainwright.report.svg import panel_svg, scatter_svg
from trainwright.report.trials import TrialRecord, best_first, objective_names, rows_of
from trainwright.safe_write import write_text

SEARCH_PAGE_NAME = "search_report.html"
LOG_RATIO = 100  # of the largest to the smallest value of a hyper-parameter from which its axis is logarithmic

Point = tuple[TrialRecord, float]  # a complete trial and one of its values


def write_search_page(output_dir: str | Path, records: Sequence[TrialRecord], directions: Sequence[str]) -> Path:
    """Write `search_report.html` into `output_dir`; returns its path.

    records: in the order of the trials. directions: "minimize" or "maximize", for each of their values.
    """
    complete = [record for record in records if record.state == "complete"]
    names = list(dict.fromkeys(name for record in complete for name in record.params))
    figures = []
    for index, (objective, direction) in enumerate(zip(objective_names(directions), directions)):
        points = [(record, value) for record in complete if (value := finite(record.values[index])) is not None]
        if points:
            figures.append(_figure(f"{objective} ({direction})", _history(objective, points, direction)))
            figures += [
                _figure(f"{objective} over {name}", drawing)
                for name in names
                if (drawing := _effect(objective, name, points))
            ]
    shown = f'<div class="figures">{"".join(figures)}</div>' if figures else '<p class="none">No trial is complete.</p>'
    header, *rows = rows_of(best_first(records, directions), directions)
    text = page(
        "Hyper-parameter search",
        {"trials": len(records), **Counter(record.state for record in records)},
        f"<h2>Figures</h2>\n{shown}\n<h2>Trials</h2>\n{table(header, rows)}\n",
    )
    path = Path(output_dir) / SEARCH_PAGE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def _figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{drawing}</figure>"


def _history(objective: str, points: Sequence[Point], direction: str) -> str:
    """The value of each complete trial and the best so far, in the order of the trials."""
    pick = min if direction == "minimize" else max
    values = [value for _, value in points]
    numbers = list(range(len(values)))
    curves = [
        Curve("each trial", numbers, values),
        Curve("best so far", numbers, list(itertools.accumulate(values, pick))),
    ]
    return panel_svg(Panel(objective, curves), 0, len(values) - 1, horizontal="trial")


def _effect(objective: str, name: str, points: Sequence[Point]) -> str:
    """The value of each trial over one hyper-parameter; nothing where that is no number, or always the same one."""
    drawn = []
    for record, value in points:
        given = record.params.get(name)
        if not isinstance(given, bool) and (number := finite(given)) is not None:
            drawn.append((number, value, f"trial {record.trial}: {objective} {value:.6g} at {name} {number:.6g}"))
    smallest, largest = min((x for x, *_ in drawn), default=0.0), max((x for x, *_ in drawn), default=0.0)
    if smallest == largest:
        return ""
    is_log = smallest > 0 and largest / smallest >= LOG_RATIO
    return scatter_svg(drawn, f"{objective} over {name}", name, is_log=is_log)
