"""The log history as JSON text, of which a save encodes only what is new.

Owns: `LogText`. Leaves to others: what a line holds (the loop), the rest of the file (state.py). Imports nothing
outside the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from numbers import Number
from typing import Any

_INDENT = "    "  # of a line: an element of a list in an object, with an indent of 2
_ALWAYS_ANEW = object()  # in place of a copy: equal to no line


class LogText:
    """Remembers the text of each line, with a copy of the line to find out whether it was changed since.

    Lines may be changed, removed and inserted by anybody, so all are compared at each save (0.1 us each, where encoding
    one takes 5); those that hold more than numbers and texts could change unseen and are encoded each time. Costs the
    memory of the text and of one shallow copy of the lines.
    """

    def __init__(self, default: Callable[[Any], Any] | None = None) -> None:
        self.num_encoded = 0  # lines, since the beginning
        self._default = default  # as of `json.dumps`
        self._copies: list[Any] = []
        self._texts: list[str] = []

    def text(self, lines: list[Any]) -> str:
        """`lines` as `json.dumps(..., indent=2, sort_keys=True)` writes them as the value of an object's key."""
        del self._copies[len(lines) :], self._texts[len(lines) :]
        num_known = len(self._copies)
        if lines[:num_known] != self._copies:
            for index, (line, copy) in enumerate(zip(lines, self._copies)):
                if copy is _ALWAYS_ANEW or line != copy:
                    self._copies[index], self._texts[index] = self._encoded(line)
        for line in lines[num_known:]:
            copy, text = self._encoded(line)
            self._copies.append(copy)
            self._texts.append(text)
        return "[\n" + ",\n".join(self._texts) + "\n  ]" if lines else "[]"

    def _encoded(self, line: Any) -> tuple[Any, str]:
        self.num_encoded += 1
        text = json.dumps(line, indent=2, sort_keys=True, default=self._default)
        is_plain = type(line) is dict and all(isinstance(v, (Number, str, type(None))) for v in line.values())
        return (dict(line) if is_plain else _ALWAYS_ANEW), _INDENT + text.replace("\n", "\n" + _INDENT)
