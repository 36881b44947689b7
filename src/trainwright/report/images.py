"""The curves of a run as image files: for a model card, a tracker, slides.

Owns: drawings as separate files. Leaves to others: scales and lines (`svg`), which values (`history`),
the PNG (`curve`). An SVG needs no library, and the Hub, GitHub, MLflow and every browser show it; its colours are those
of the light page on white, since not every viewer knows CSS variables.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainwright.interop.optional import is_installed
from trainwright.report.curve import plot_history
from trainwright.report.history import Panel, is_eval_loss, label_of, metrics_in, panels_of
from trainwright.report.palette import LIGHT, color_of
from trainwright.report.svg import HEIGHT, LEFT, WIDTH, panel_svg
from trainwright.safe_write import write_text

HEAD = 44  # height of the title and the key, in units of the drawing
MOST_PANELS = 4  # of an overview
CHARACTER = 7.2  # width, about, of a letter of the key
LONGEST_NAME = 80  # characters of a file's name, before its ending

_LIGHT = {"ink": "#1a202c", "soft": "#64748b", "line": "#e2e8f0"} | {f"c{i}": color for i, color in enumerate(LIGHT)}
_VARIABLE = re.compile(r"var\(--(\w+)\)")
_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def write_images(directory: str | os.PathLike[str], log_history: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write each panel of the report as an SVG file into `directory`, and all of them as `curves.png` where matplotlib
    is installed. Returns the paths; none where nothing was logged that can be drawn.
    """
    folder, paths = Path(directory), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in panel_images(log_history).items():
        paths.append(folder / f"{name}.svg")
        write_text(paths[-1], text)
    if paths and is_installed("matplotlib"):
        paths.append(plot_history(log_history, folder / "curves.png"))
    return paths


def panel_images(log_history: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Name that is fit for a file -> SVG, of each panel: "loss", "eval_f1", "learning_rate" ..."""
    panels = panels_of(log_history)
    images: dict[str, str] = {}
    for panel in panels:
        images[_file_name(panel, images)] = _image([panel], *_range(panels), num_columns=1)
    return images


def overview_image(log_history: Iterable[Mapping[str, Any]]) -> str:
    """One SVG with the losses and the metrics of evaluations, at most MOST_PANELS; "" without any."""
    panels = [panel for panel in panels_of(log_history) if _measures(panel)][:MOST_PANELS]
    return _image(panels, *_range(panels), num_columns=1 if len(panels) == 1 else 2) if panels else ""


def _measures(panel: Panel) -> bool:
    names = [curve.name for curve in panel.curves]
    return "loss" in names or any(map(is_eval_loss, names)) or bool(metrics_in(names))


def _range(panels: Sequence[Panel]) -> tuple[int, int]:
    steps = [step for panel in panels for curve in panel.curves for step in curve.steps]
    return min(steps, default=0), max(steps, default=0)


def _image(panels: Sequence[Panel], first: int, last: int, *, num_columns: int) -> str:
    num_rows = -(-len(panels) // num_columns)
    width, height = num_columns * WIDTH, num_rows * (HEAD + HEIGHT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    ]
    for index, panel in enumerate(panels):
        x, y = index % num_columns * WIDTH, index // num_columns * (HEAD + HEIGHT)
        place = f'<svg x="{x}" y="{y + HEAD}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(_head(panel, x, y) + panel_svg(panel, first, last).replace("<svg ", place, 1))
    text = _VARIABLE.sub(lambda found: _LIGHT[found[1]], "".join(parts) + "</svg>\n")
    return _NOT_IN_XML.sub("\ufffd", text)


def _head(panel: Panel, x: float, y: float) -> str:
    """The title of a panel, and under it the key where it has several curves."""
    parts = [_words(x + LEFT, y + 18, panel.title, 14, "ink", ' font-weight="600"')]
    if len(panel.curves) > 1:
        at = x + LEFT
        for index, curve in enumerate(panel.curves):
            label = label_of(curve.name)
            color = color_of(index)
            parts.append(f'<rect x="{at:.0f}" y="{y + 32}" width="14" height="3" fill="{color}"/>')
            parts.append(_words(at + 19, y + 37, label, 12, "soft"))
            at += 33 + CHARACTER * len(label)
    return "".join(parts)


def _words(x: float, y: float, text: str, size: int, color: str, more: str = "") -> str:
    escaped = html.escape(text)
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="var(--{color})"{more}>{escaped}</text>'


def _file_name(panel: Panel, others: Iterable[str]) -> str:
    """A name of letters, digits, dashes and dots that none of `others` is."""
    name = panel.curves[0].name if len(panel.curves) == 1 else panel.title.lower()
    name = re.sub(r"[^\w-]+", "_", name, flags=re.ASCII).strip("_")[:LONGEST_NAME] or "curve"
    others, number = set(others), 2
    unique = name
    while unique in others:
        unique, number = f"{name}-{number}", number + 1
    return unique
