"""The curves of a run as text.

Owns: drawing them with Braille dots, 2 by 4 in a character. Leaves to others: which curves there are (`history`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from trainwright.report.history import Curve, is_eval_loss, label_of, metrics_in, panels_of
from trainwright.report.html import key_numbers
from trainwright.report.page import number_text
from trainwright.report.run_history import RunHistory

LEFT = 11  # columns for the numbers of the vertical axis
LEAST_HEIGHT, MOST_HEIGHT = 4, 12  # rows of a drawing
# Bit of the dot in column 0 or 1 and row 0 to 3 of a Braille character.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
BLANK = 0x2800


def drawing(history: RunHistory, name: str, width: int, height: int) -> str:
    """The run in at most `width` columns and about `height` rows: a line of numbers, then losses and metrics."""
    numbers = "  ".join(f"{what} {number_text(value)}" for what, value in key_numbers(history).items())
    title = _one_line(str(history.about.get("name") or name))
    head = [title[:width], _one_line(numbers)[:width], ""]
    curves = [curve for panel in panels_of(history.lines) for curve in panel.curves if _measures(curve.name)]
    if not curves:
        return "\n".join([*head, "Nothing was logged."])
    num_shown = min(len(curves), max(1, (height - len(head) - 1) // (LEAST_HEIGHT + 3)))
    rows = max(LEAST_HEIGHT, min(MOST_HEIGHT, (height - len(head) - 1) // num_shown - 3))
    last = max(curve.steps[-1] for curve in curves)
    first = min(curve.steps[0] for curve in curves)
    for curve in curves[:num_shown]:
        label = f"{label_of(curve.name)}: {number_text(curve.values[-1])}"
        if history.best is not None and history.best.name == curve.name:
            label += f" (best {number_text(history.best.value)} at step {history.best.step:,})"
        head += [_one_line(label)[:width], *plot(curve, first, last, width, rows), ""]
    return "\n".join(head[:-1])


def _measures(name: str) -> bool:
    return name == "loss" or is_eval_loss(name) or bool(metrics_in([name]))


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def plot(curve: Curve, first: int, last: int, width: int, rows: int) -> list[str]:
    """`rows` lines of dots with the highest and lowest value at their left, and one with the steps at the ends."""
    columns = max(width - LEFT - 1, 10)
    low, high = min(curve.values), max(curve.values)
    cells = [[0] * columns for _ in range(rows)]

    def place(step: int, value: float) -> tuple[int, int]:
        across = (step - first) / ((last - first) or 1) * (2 * columns - 1)
        down = (high - value) / ((high - low) or 1.0) * (4 * rows - 1) if high > low else 2 * rows
        return round(across), round(down)

    def mark(x: int, y: int) -> None:
        cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]

    points = [place(step, value) for step, value in zip(curve.steps, curve.values)]
    mark(*points[0])
    for (x0, y0), (x1, y1) in pairwise(points):
        num = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(num + 1):
            mark(round(x0 + (x1 - x0) * i / num), round(y0 + (y1 - y0) * i / num))
    return [*_framed(cells, low, high), _steps(first, last, columns)]


def _framed(cells: Sequence[Sequence[int]], low: float, high: float) -> list[str]:
    labels = {0: number_text(high), len(cells) - 1: number_text(low)}
    return [
        f"{labels.get(index, '')[: LEFT - 2]:>{LEFT - 2}} |" + "".join(chr(BLANK + cell) for cell in row)
        for index, row in enumerate(cells)
    ]


def _steps(first: int, last: int, columns: int) -> str:
    left, right = f"{first:,}", f"step {last:,}"
    return " " * LEFT + left + " " * max(columns - len(left) - len(right), 1) + right
