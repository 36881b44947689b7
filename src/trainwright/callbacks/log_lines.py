"""A log line for people: names and values in columns that fit the width of the terminal, with colour where it takes it.

Owns: the layout and the colours. Leaves to others: when and to whom a line is written (`progress`).
Imported where the first line is shown in a terminal. The order of NO_COLOR, FORCE_COLOR and TERM=dumb is that of
Python's own colours (3.13).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from trainwright.callbacks.progress import knows_epoch, total_epochs_text
from trainwright.state import TrainerState

VALUE_WIDTH = 9  # characters of "4.987e-05"
GAP = "  "
# Speeds come last, as a value with its unit.
UNITS = {
    "_runtime": "s",
    "_samples_per_second": "samples/s",
    "_steps_per_second": "steps/s",
    "_tokens_per_second": "tokens/s",
}
SHORT_NAMES = {"learning_rate": "lr"}
_DIM, _CYAN, _RED, _RESET = "\x1b[2m", "\x1b[36m", "\x1b[1;31m", "\x1b[0m"


def takes_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether text on `stream` may have colours: NO_COLOR forbids them, FORCE_COLOR asks for them, a terminal takes
    them unless it is called dumb. Each counts where it is set and not empty.
    """
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return environment.get("TERM") != "dumb" and stream.isatty()


def readable_value(value: Any) -> str:
    """
    >>> [readable_value(value) for value in (0.125, 12.3456, 4.9871e-05, 45678.9, 1024, float("nan"))]
    ['0.1250', '12.35', '4.987e-05', '45,679', '1,024', 'nan']
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return " ".join(str(value).split())  # one line
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:#.4g}".removesuffix(".")
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.3e}" if math.isfinite(value) else f"{value}"


def log_line(logs: Mapping[str, Any], state: TrainerState, width: int, colour: bool = False) -> str:
    """`logs` in columns, in as many lines of at most `width` characters as it takes, the later ones indented.

    >>> state = TrainerState(global_step=5, max_steps=60, epoch=0.25, num_train_epochs=3)
    >>> print(log_line({"loss": 0.125, "learning_rate": 5e-05, "epoch": 0.25}, state, width=80))
     5/60  epoch 0.25  loss    0.1250  lr 5.000e-05
    """
    total = str(state.max_steps)
    head = f"{state.global_step:>{len(total)}}/{total}"
    if "epoch" in logs and knows_epoch(state):
        digits = len(total_epochs_text(state).strip("/")) or 1
        head += f"{GAP}epoch {logs['epoch']:>{digits + 3}.2f}"
    lines, indent = [head], " " * (len(head) + len(GAP))
    if len(indent) > width // 2:
        indent = GAP
    used = len(head)
    for name, value in _columns(logs):
        room = max(width - len(indent), 1)
        plain = disp_trim(f"{name} {value}".strip() if name else value, room)
        if used + len(GAP) + disp_len(plain) > width and used > 0:
            lines.append(indent.removesuffix(GAP))
            used = len(indent) - len(GAP)
        lines[-1] += GAP + (_coloured(plain, name, value) if colour else plain)
        used += len(GAP) + disp_len(plain)
    return "\n".join(lines)


def shown_width() -> int:
    """Columns of the terminal, or COLUMNS, or 80."""
    return shutil.get_terminal_size().columns


def _columns(logs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of each column; values are of one width, so that those of two lines align."""
    speeds = []
    for name, value in logs.items():
        unit = next((unit for suffix, unit in UNITS.items() if name.endswith(suffix)), None)
        if name == "epoch":
            continue
        if unit is not None:
            speeds.append(("", _with_unit(value, unit)))
        else:
            yield SHORT_NAMES.get(name, name), f"{readable_value(value):>{VALUE_WIDTH}}"
    yield from speeds


def _with_unit(value: Any, unit: str) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return f"{value} {unit}"
    if unit == "s" and value >= 60:
        return str(tqdm.format_interval(value))
    return f"{value:#.3g}".removesuffix(".") + f" {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def _coloured(plain: str, name: str, value: str) -> str:
    if value.strip() in ("nan", "inf", "-inf"):
        return f"{_RED}{plain}{_RESET}"
    if not name:
        return f"{_DIM}{plain}{_RESET}"
    shade = _CYAN if name.startswith("eval_") else _DIM
    return f"{shade}{plain[: len(name)]}{_RESET}{plain[len(name) :]}"
