"""One HTML file about a run: its key numbers, its curves, its evaluations.

Owns: the look of that file. Leaves to others: which values belong into it (`history`) and the key numbers (the caller).
The file needs nothing from outside: style and drawings are inside it, and there is no script.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainwright.report.history import is_eval_loss, label_of, metrics_in, panels_of, time_of_phases
from trainwright.report.svg import panel_svg, shares_svg
from trainwright.safe_write import write_text

REPORT_NAME = "training_report.html"
MAX_ROWS = 200  # of the table of evaluations; the last ones are shown

STYLE = """
:root { --ink: #1a202c; --soft: #64748b; --line: #e2e8f0; --paper: #ffffff; --card: #f8fafc;
        --c0: #2b6cb0; --c1: #dd6b20; --c2: #2f855a; --c3: #b83280; --c4: #6b46c1; --c5: #b7791f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e8f0; --soft: #94a3b8; --line: #334155; --paper: #0f172a; --card: #1e293b;
          --c0: #63b3ed; --c1: #f6ad55; --c2: #68d391; --c3: #f687b3; --c4: #b794f4; --c5: #f6e05e; } }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.6rem; margin: 0 0 1.2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .8rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .7rem; margin: 0; }
.numbers div, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
                       padding: .7rem .9rem; }
.numbers dt { color: var(--soft); font-size: .8rem; }
.numbers dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: .9rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { display: block; width: 100%; height: auto; }
.key { font-weight: 400; font-size: .85rem; color: var(--soft); margin-left: .9rem; }
.key::before { content: ""; display: inline-block; width: .9rem; height: 3px; margin-right: .35rem;
               vertical-align: middle; background: var(--c); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.none { color: var(--soft); }
"""


def write_report(
    output_dir: str | os.PathLike[str], log_history: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> Path:
    """Write `training_report.html` into `output_dir` and return its path.

    summary: key numbers by name, in the order to show them; `"title"` is the heading of the page.
    """
    title = str(summary.get("title", "Training report"))
    text = page(
        title,
        {name: value for name, value in summary.items() if name != "title"},
        f"{_time(log_history)}"
        f"<h2>Curves</h2>\n{_figures(log_history)}\n"
        f"<h2>Evaluations</h2>\n{_evaluations(log_history)}\n",
    )
    path = Path(output_dir) / REPORT_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def page(title: str, numbers: Mapping[str, Any], body: str) -> str:
    """A page with its key `numbers` by name, in the order to show them; `body` is HTML."""
    shown = "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(number_text(value))}</dd></div>"
        for name, value in numbers.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f'<dl class="numbers">{shown}</dl>\n{body}</body>\n</html>\n'
    )


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """An HTML table; None is an empty cell."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in header)
    body = ""
    for row in rows:
        cells = ("" if value is None else number_text(value) for value in row)
        body += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>\n"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def number_text(value: Any) -> str:
    """
    >>> number_text(12800), number_text(0.123456789), number_text(2e-05), number_text(True), number_text("bf16")
    ('12,800', '0.1235', '2e-05', 'yes', 'bf16')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def _time(log_history: Sequence[Mapping[str, Any]]) -> str:
    """The time by phase, as a bar and its numbers; nothing where the run did not measure it."""
    seconds = time_of_phases(log_history)
    if not seconds:
        return ""
    total = sum(seconds.values())
    keys = "".join(
        f'<span class="key" style="--c: var(--c{index % 6})">{html.escape(part)} {value / total:.1%} '
        f"({number_text(value)} s)</span>"
        for index, (part, value) in enumerate(seconds.items())
    )
    bar = shares_svg(seconds, "Where the time went")
    return f"<h2>Where the time went</h2>\n<figure>{bar}<figcaption>{keys}</figcaption></figure>\n"


def _figures(log_history: Sequence[Mapping[str, Any]]) -> str:
    panels = panels_of(log_history)
    steps = [step for panel in panels for curve in panel.curves for step in curve.steps]
    figures = []
    for panel in panels:
        keys = ""
        if len(panel.curves) > 1:
            keys = "".join(
                f'<span class="key" style="--c: var(--c{index % 6})">{html.escape(label_of(curve.name))}</span>'
                for index, curve in enumerate(panel.curves)
            )
        caption = f"<figcaption>{html.escape(panel.title)}{keys}</figcaption>"
        figures.append(f"<figure>{caption}{panel_svg(panel, min(steps), max(steps))}</figure>")
    if not figures:
        return '<p class="none">Nothing was logged.</p>'
    return f'<div class="figures">{"".join(figures)}</div>'


def _evaluations(log_history: Sequence[Mapping[str, Any]]) -> str:
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
    shown_rows = [
        (step, *(row.get(name) for name in ("epoch", *names))) for step, row in list(rows.items())[-MAX_ROWS:]
    ]
    note = f'<p class="none">The last {MAX_ROWS} of {len(rows)}.</p>' if len(rows) > MAX_ROWS else ""
    return f"{note}{table(header, shown_rows)}"
