"""What the pages of this package have in common: style, key numbers, tables, charts.

Owns: the frame of a page and the look of its pieces, what its script is given, and that nothing is loaded from outside.
Leaves to others: what a page says (`html`, `search_page`, `compare`), the curves as drawings (`svg`).

A page is one file. Its charts are drawings that need no script; where a script may run, uPlot draws them anew, with
values under the pointer, smoothing and a logarithmic axis (docs/decisions/0009). A policy in the page lets no
other script run, should a text of a run ever be mistaken for one, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from trainwright.report.history import Best, Panel, label_of, thinned
from trainwright.report.palette import DARK, LIGHT, color_of, variables
from trainwright.report.svg import panel_svg

MAX_POINTS = 1500  # of a curve, for the script

STYLE = (
    ":root { color-scheme: light dark; --ink: #1a202c; --soft: #5b677a; --line: #e2e8f0; --paper: #ffffff; "
    f"--card: #f8fafc; --mark: #fef3c7;\n        {variables(LIGHT)} }}\n"
    "@media (prefers-color-scheme: dark) {\n"
    "  :root { --ink: #e2e8f0; --soft: #a3b1c6; --line: #334155; --paper: #0f172a; --card: #1e293b; --mark: #453a12;\n"
    f"          {variables(DARK)} }} }}\n"
    """* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .8rem; }
.about { color: var(--soft); margin: .3rem 0 1.2rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .7rem; margin: 0; }
.numbers div, figure, .warnings { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
                                  padding: .7rem .9rem; }
.numbers dt { color: var(--soft); font-size: .8rem; }
.numbers dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.warnings { margin: 1rem 0 0; border-left: 4px solid var(--c1); }
.warnings summary { cursor: pointer; font-weight: 600; }
.warnings ul { margin: .5rem 0 0; padding-left: 1.2rem; }
.tools { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: center; margin: 0 0 .8rem; font-size: .9rem; }
.tools[hidden] { display: none; } .tools label { display: flex; gap: .5rem; align-items: center; }
.tools span { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: .9rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
.keys { display: flex; flex-wrap: wrap; gap: 0 .9rem; margin-top: .3rem; }
.key { font-weight: 400; font-size: .85rem; color: var(--soft); white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: .9rem; height: .55rem; margin-right: .35rem;
               border-radius: 2px; background: var(--c); }
.drawn .still, .drawn .keys { display: none; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.words th, .words td { text-align: left; } .words td { white-space: normal; min-width: 6rem; }
.words td:first-child { white-space: nowrap; }
tr.best td { background: var(--mark); font-weight: 600; }
.none { color: var(--soft); }
.uplot { width: 100% !important; } .uplot .u-legend { text-align: left; font-size: .85rem; margin: 0; width: 100%; }
.u-legend th, .u-legend td { border: 0; padding: 1px 4px; white-space: normal; text-align: left; }
.u-legend .measured, .u-legend tr:first-child .u-marker { display: none; }
 .u-legend .u-marker { width: .9rem; height: .55rem; border-radius: 2px; }
.u-over { touch-action: pan-y; }
@media (pointer: coarse) { .tools span { display: none; } }
@media (max-width: 30rem) { body { padding: 1.2rem .8rem 3rem; } figure { padding: .6rem .5rem; }
  .numbers { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; } .numbers div { padding: .5rem .6rem; }
  th, td { padding: .35rem .45rem; } .words td:first-child { white-space: normal; } }
"""
)

TOOLS = (
    '<div class="tools" hidden><label>Smoothing <input id="smoothing" type="range" min="0" max="0.99" step="0.01" '
    'value="0"></label><label><input id="log" type="checkbox"> Logarithmic</label>'
    "<span>Drag to zoom, double-click to see all.</span></div>"
)


class Figure(NamedTuple):
    """Curves that share their axes: how the script knows them, and the drawing for where it does not run.

    `names`: of the curves, for people. `best`: in one of them.
    """

    panel: Panel
    names: Sequence[str]
    best: Best | None = None

    @classmethod
    def of(cls, panel: Panel, best: Best | None = None) -> Figure:
        names = [curve.name for curve in panel.curves]
        return cls(panel, [label_of(name) for name in names], best if best and best.name in names else None)

    def data(self) -> dict[str, Any]:
        """As the script is given it; colours are their numbers."""
        curves = []
        for index, (curve, name) in enumerate(zip(self.panel.curves, self.names)):
            if not curve.steps:
                continue
            shown = thinned(curve, MAX_POINTS)
            points = dict(sorted(zip(shown.steps, shown.values), key=lambda point: point[0]))  # the later value counts
            color = index % len(LIGHT)
            curves.append({"name": name, "color": color, "steps": list(points), "values": list(points.values())})
        found: dict[str, Any] = {"title": self.panel.title, "x": "step", "y": self.panel.title, "curves": curves}
        if self.best is not None:
            index = [curve.name for curve in self.panel.curves].index(self.best.name)
            found["best"] = {"color": index % len(LIGHT), "step": self.best.step, "value": self.best.value}
        return found


def figures_html(figures: Sequence[Figure], first: int, last: int) -> str:
    """The charts from step `first` to `last`, with what sets all of them."""
    if not figures:
        return '<p class="none">Nothing was logged.</p>'
    parts = []
    for index, figure in enumerate(figures):
        keys = keys_html(figure.names) if len(figure.names) > 1 else ""
        caption = f"<figcaption>{html.escape(figure.panel.title)}</figcaption>{keys}"
        still = panel_svg(figure.panel, first, last, best=figure.best)
        parts.append(
            f'<figure data-panel="{index}">{caption}<div class="still">{still}</div><div class="chart"></div></figure>'
        )
    return f'{TOOLS}<div class="figures">{"".join(parts)}</div>'


def keys_html(texts: Iterable[str]) -> str:
    """What the colours 0, 1, 2 ... mean."""
    keys = "".join(
        f'<span class="key" style="--c: {color_of(index)}">{html.escape(text)}</span>'
        for index, text in enumerate(texts)
    )
    return f'<div class="keys">{keys}</div>'


def page(
    title: str,
    numbers: Mapping[str, Any],
    body: str,
    *,
    about: str = "",
    figures: Sequence[Figure] = (),
    is_watched: bool = False,
) -> str:
    """A page with its key `numbers` by name, in the order to show them; `body` is HTML, which has the `figures`.

    about: a line below the title. is_watched: it is served, and loads itself again when there is more.
    """
    shown = "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(number_text(value))}</dd></div>"
        for name, value in numbers.items()
    )
    scripts, style = "", STYLE
    if figures or is_watched:
        style += _asset("uPlot.min.css")
        data = json_in_html([figure.data() for figure in figures])
        scripts = f'<script type="application/json" id="data">{data}</script>\n' + "".join(
            f"<script>{_asset(name)}</script>\n" for name in SCRIPTS
        )
    watched = ' data-watch="yes"' if is_watched else ""
    below = f'<p class="about">{html.escape(about)}</p>' if about else '<p class="about"></p>'
    return (
        f'<!DOCTYPE html>\n<html lang="en"{watched}>\n<head>\n'
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{_policy(is_watched)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f'{below}\n<dl class="numbers">{shown}</dl>\n{body}{scripts}</body>\n</html>\n'
    )


SCRIPTS = ("uPlot.iife.min.js", "report.js")


def json_in_html(value: Any) -> str:
    """`value` as JSON that ends no `<script>` element, whatever its texts hold.

    >>> json_in_html("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _asset(name: str) -> str:
    return (files("trainwright.report") / "assets" / name).read_text(encoding="utf-8").strip()


@cache
def _policy(is_watched: bool) -> str:
    hashes = (base64.b64encode(hashlib.sha256(_asset(name).encode()).digest()).decode() for name in SCRIPTS)
    scripts = " ".join(f"'sha256-{one}'" for one in hashes)
    fetched = " connect-src 'self';" if is_watched else ""
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:;{fetched} script-src {scripts}"


def table(header: Iterable[str], rows: Iterable[Iterable[Any]], *, best: int | None = None, kind: str = "") -> str:
    """An HTML table; None is an empty cell. `best`: number of the row that is marked. `kind`: a class of the style."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in header)
    body = ""
    for index, row in enumerate(rows):
        cells = ("" if value is None else number_text(value) for value in row)
        mark = ' class="best"' if index == best else ""
        body += f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>\n"
    shape = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{shape}><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


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


_UNITS = ((60, 1, ("min", "s"), 3600), (3600, 60, ("h", "min"), 86400), (86400, 3600, ("d", "h"), float("inf")))


def duration_text(seconds: float) -> str:
    """
    >>> duration_text(4.2), duration_text(75), duration_text(7260), duration_text(200000)
    ('4.2 s', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    large, small, names, _ = next(unit for unit in _UNITS if seconds < unit[3])
    return f"{int(seconds // large)} {names[0]} {int(seconds % large // small)} {names[1]}"
