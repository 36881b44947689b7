"""A log history as a PNG.

Owns: the layout of the figure. Leaves to others: which values it has (`history`). matplotlib is imported on use,
without its global state (`pyplot`), so that the user's figures are not affected.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainwright.interop.optional import require
from trainwright.report.history import Panel, label_of, panels_of, thinned
from trainwright.report.palette import LIGHT
from trainwright.safe_write import fresh

INK, FAINT = "#2d3748", "#e2e8f0"
MAX_MARKERS = 40
MAX_POINTS = 2000  # per curve; about one per pixel of the widest figure


def plot_history(
    log_history: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], title: str | None = None
) -> Path:
    """Draw losses, evaluation metrics, learning rate and gradient norm over steps into the PNG file `path`.

    Returns the path. Raises ValueError where the history holds nothing to draw, MissingExtra without matplotlib.
    """
    figures = require("matplotlib.figure", "plot_history", package="matplotlib", extra="plot")
    panels = panels_of(log_history)
    if not panels:
        raise ValueError(
            "plot_history: log_history holds no loss, metric or learning rate with a step, so there is nothing to "
            "draw. Pass trainer.state.log_history of a run that has logged."
        )
    num_columns = 1 if len(panels) == 1 else 2
    num_rows = -(-len(panels) // num_columns)
    figure = figures.Figure(figsize=(6.4 * num_columns, 3.6 * num_rows), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False, sharex=True).flat)
    for axes, panel in zip(grid, panels):
        _draw(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if title:
        figure.suptitle(_shown(title), fontsize=14, fontweight="bold", color=INK)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with fresh(path) as staged:
        figure.savefig(staged, format="png", facecolor="white")
    return path


def _draw(axes: Any, panel: Panel) -> None:
    for curve, color in zip(panel.curves, LIGHT * len(panel.curves)):
        # A marker per point shows where a value was measured, as long as the markers stay apart.
        marker = "o" if len(curve.steps) <= MAX_MARKERS else None
        shown = thinned(curve, MAX_POINTS)
        label = _shown(label_of(curve.name))
        axes.plot(shown.steps, shown.values, color=color, linewidth=1.6, marker=marker, markersize=3.5, label=label)
    axes.set_title(_shown(panel.title), loc="left", fontsize=11, fontweight="bold", color=INK, pad=16)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.grid(True, axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, length=0, labelbottom=True)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    if max(curve.steps[-1] for curve in panel.curves) <= 10:
        axes.xaxis.get_major_locator().set_params(integer=True)
    if len(panel.curves) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _shown(text: str) -> str:
    """`text` without what the drawing library would take for a formula, or cannot draw."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text).replace("$", r"\$")
