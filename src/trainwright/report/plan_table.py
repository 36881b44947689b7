"""The plan of a run, as a block of text to read before it starts.

Owns: the layout of that block. Leaves to others: its rows (`plan`, `parallel`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

MAX_WIDTH = 100  # columns; wider than a terminal, the block would wrap in the wrong place


def plan_table(rows: Sequence[tuple[str, str]]) -> str:
    """Lay out `rows` of (what, how much) in two columns; long values continue below their own column.

    A value may hold line breaks. An empty name continues the row above; a row of two empty texts is a blank line.

    >>> print(plan_table([("samples", "12,800"), ("total batch", "64 = 8 per device x 2 devices x 4 accumulated")]))
      samples      12,800
      total batch  64 = 8 per device x 2 devices x 4 accumulated
    """
    name_width = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, value in rows:
        pieces = [piece for line in str(value).splitlines() for piece in _wrapped(line, name_width)] or [""]
        for index, piece in enumerate(pieces):
            lines.append(f"  {name if index == 0 else '':<{name_width}}  {piece}".rstrip())
    return "\n".join(lines)


def _wrapped(line: str, name_width: int) -> list[str]:
    # Paths and names stay whole: a broken path cannot be copied.
    width = max(MAX_WIDTH - name_width - 4, 20)
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
