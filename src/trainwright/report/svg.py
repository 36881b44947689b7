"""One panel of curves or dots as an SVG drawing inside an HTML page.

Owns: scales, ticks, lines and dots. Leaves to others: captions, which colour a number has (`palette`; --ink, --soft and
--line are CSS variables of the page).
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

from trainwright.report.history import Best, Panel, label_of, thinned
from trainwright.report.palette import color_of

WIDTH, HEIGHT = 560, 260  # in units of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 14, 46  # room for the numbers of the axes, and the name of the horizontal one
BAR_HEIGHT = 34
MAX_POINTS = 800  # per curve; more than one per unit of width cannot be seen
MAX_DOTS = 40  # points that still get a dot, which shows its value under the pointer


def panel_svg(panel: Panel, first: int, last: int, horizontal: str = "step", best: Best | None = None) -> str:
    """An `<svg>` element with the curves of `panel` from `first` to `last`, which count what `horizontal` names.

    `best` is marked by a ring where one of the curves has it.
    """
    all_values = [value for curve in panel.curves for value in curve.values]
    if first == last:
        first, last = first - 1, last + 1
    y_of, parts = _frame(f"{panel.title} over {horizontal}s", all_values, horizontal)

    def x_of(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    for step in ticks(first, last, 6):
        if step == int(step):
            parts.append(_text(x_of(step), HEIGHT - BOTTOM + 18, f"{int(step):,}", "middle"))
    for index, curve in enumerate(panel.curves):
        color = color_of(index)
        points = [(x_of(step), y_of(value)) for step, value in zip(*thinned(curve, MAX_POINTS)[1:])]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2" stroke-linejoin="round"/>'
        )
        if len(points) <= MAX_DOTS:
            name = label_of(curve.name)
            for (x, y), step, value in zip(points, curve.steps, curve.values):
                parts.append(_dot(x, y, color, f"{name} {value:.6g} at {horizontal} {step:,}"))
        if best is not None and best.name == curve.name:
            place = f'cx="{x_of(best.step):.1f}" cy="{y_of(best.value):.1f}"'
            parts.append(
                f'<circle class="best" {place} r="6" fill="none" stroke="{color}" stroke-width="2">'
                f"<title>best: {best.value:.6g} at {horizontal} {best.step:,}</title></circle>"
            )
    return "".join(parts) + "</svg>"


def scatter_svg(
    points: Sequence[tuple[float, float, str]], title: str, horizontal: str, *, is_log: bool = False
) -> str:
    """An `<svg>` element with one dot per (horizontal value, vertical value, text that the pointer shows).

    The horizontal values are not all the same; with `is_log` they are positive, and their axis is logarithmic.
    """
    scale = math.log10 if is_log else float
    low, high = _widened(min(scale(x) for x, *_ in points), max(scale(x) for x, *_ in points))
    y_of, parts = _frame(title, [y for _, y, _ in points], horizontal)

    def x_of(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    for value in ticks(low, high, 4):
        parts.append(_text(x_of(value), HEIGHT - BOTTOM + 18, f"{10**value if is_log else value:.3g}", "middle"))
    parts += [_dot(x_of(scale(x)), y_of(y), "var(--c0)", text) for x, y, text in points]
    return "".join(parts) + "</svg>"


def _frame(title: str, values: Sequence[float], horizontal: str) -> tuple[Callable[[float], float], list[str]]:
    """The beginning of a drawing with a vertical axis for `values`: where a value is, and its pieces so far."""
    low, high = _widened(min(values), max(values))

    def y_of(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, html.escape(horizontal), "middle"))
    for value in ticks(low, high, 5):
        y = y_of(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:.4g}", "end"))
    return y_of, parts


def _dot(x: float, y: float, color: str, tip: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"><title>{html.escape(tip)}</title></circle>'


def shares_svg(shares: Mapping[str, float], title: str) -> str:
    """An `<svg>` element with one bar, cut in proportion to `shares`, whose pieces have the colours 0, 1, 2 ..."""
    total, x = sum(shares.values()), 0.0
    parts = [f'<svg viewBox="0 0 {WIDTH} {BAR_HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for index, (name, value) in enumerate(shares.items()):
        width = value / total * WIDTH
        tip = f"<title>{html.escape(name)} {value / total:.1%}</title>"
        place = f'x="{x:.2f}" y="0" width="{width:.2f}" height="{BAR_HEIGHT}"'
        parts.append(f'<rect {place} fill="{color_of(index)}">{tip}</rect>')
        x += width
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, num_wanted: int) -> list[float]:
    """Round numbers between `low` and `high`, about `num_wanted` of them.

    >>> ticks(0, 100, 5), ticks(0.13, 0.52, 4)
    ([0.0, 20.0, 40.0, 60.0, 80.0, 100.0], [0.2, 0.3, 0.4, 0.5])
    """
    raw = (high - low) / num_wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    distance = next(factor * magnitude for factor in (1, 2, 5, 10) if raw <= factor * magnitude * 1.0001)
    start, stop = math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9)
    return [float(f"{index * distance:.12g}") for index in range(start, stop + 1)]


def _widened(low: float, high: float) -> tuple[float, float]:
    """Room above and below; a flat curve gets a range around it, because a range of zero has no scale."""
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="var(--soft)" text-anchor="{anchor}">{text}</text>'
