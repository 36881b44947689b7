"""The log history as JSON text, encoded incrementally: a save encodes only new lines.

Owns: `LogText`. Leaves to others: what a line holds (the loop), the rest of the file (state.py). Imports nothing
outside the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any, NamedTuple

from trainwright.log_values import plain_line, plain_value

MOST_COMPARED = 4096  # earlier lines that a save compares (0.1 to 0.4 us each, where encoding one takes 5)
SMALL_BYTES = 1 << 18  # of a text that is copied

_INDENT = "    "  # of a line: an element of a list in an object, with an indent of 2
_ALWAYS_ENCODE = object()  # in place of a copy: equal to no line
_OPENING, _SEPARATOR, _CLOSING = b"[\n", b",\n", b"\n  ]"


class StateText(NamedTuple):
    """The text of a trainer state, in three parts, so that the long one is not copied needlessly."""

    head: bytes
    log: bytearray | memoryview | bytes
    tail: bytes
    # The object and version of `log`: with equal ones it has only grown in between.
    version: tuple[Any, int] = (None, 0)

    def write(self, path: str) -> None:
        parts = self[:3]
        with open(path, "wb") as file:
            for part in [b"".join(parts)] if len(self.log) < SMALL_BYTES else parts:
                file.write(part)


class LogText:
    """Caches the text of all lines, with a copy of each line to detect changes.

    Lines may be changed, removed and inserted by any code. Up to MOST_COMPARED of them are compared at each save. In a
    longer log a save compares the latest half of that number, and another half in rotation, so that its cost depends on
    the number of new lines, not of all; a change triggers a full comparison. So a change in place far back in a long
    log is in the file some saves later. Lines that hold more than numbers and texts are encoded whenever they are
    compared, since their values could be mutated. Costs the memory of the text and of one shallow copy of the lines.
    """

    def __init__(self, warn: Callable[[dict[str, str]], None] | None = None) -> None:
        """`warn`: called with what `plain_line` changed in a line that code other than `Trainer.log` added."""
        self.num_encoded = self.num_compared = 0  # lines, since the beginning
        self.num_rewritten = 0  # how often existing text was changed
        self._warn = warn
        self._copies: list[Any] = []
        self._ends: list[int] = []  # of each line in `_text`
        self._text = bytearray()  # without the bracket that closes it
        self._next = 0  # line at which the rotating comparison continues

    def update(self, lines: list[Any], *, thoroughly: bool = True) -> bytearray:
        """The text of `lines`, as `json.dumps(..., indent=2, sort_keys=True)` writes them as the value of an object's
        key, without `closing`. It is the internal buffer: read it before the next call, and do not change it.

        `thoroughly`: compare all lines, however many there are.
        """
        if len(lines) < len(self._copies):
            del self._copies[len(lines) :], self._ends[len(lines) :]
            del self._text[self._ends[-1] if lines else 0 :]
            self.num_rewritten += 1
            thoroughly = True
        num_known = len(self._copies)
        if thoroughly or num_known <= MOST_COMPARED or self._is_changed(lines, num_known):
            self._compare(lines, 0, num_known)
        for line in lines[num_known:]:
            copy, text = self._encoded(line)
            self._text += (_SEPARATOR if self._copies else _OPENING) + text
            self._copies.append(copy)
            self._ends.append(len(self._text))
        return self._text

    @property
    def closing(self) -> bytes:
        """The end of the text of `update`."""
        return _CLOSING if self._copies else b"[]"

    def _is_changed(self, lines: list[Any], num_known: int) -> bool:
        """Compare and update the lines of this turn; whether some had changed."""
        half = MOST_COMPARED // 2
        begin = self._next if self._next < num_known - half else 0
        self._next = begin + half
        latest = self._compare(lines, num_known - half, num_known)
        return self._compare(lines, begin, min(self._next, num_known - half)) or latest

    def _compare(self, lines: list[Any], begin: int, end: int) -> bool:
        """Update the lines from `begin` to `end`; whether one had changed unexpectedly."""
        self.num_compared += end - begin
        if lines[begin:end] == self._copies[begin:end]:
            return False
        made = {
            index: self._encoded(lines[index])
            for index in range(begin, end)
            if self._copies[index] is _ALWAYS_ENCODE or lines[index] != self._copies[index]
        }
        is_changed = any(self._copies[index] is not _ALWAYS_ENCODE for index in made)
        self._replace({index: text for index, (_, text) in made.items() if text != self._text[self._span(index)]})
        for index, (copy, _) in made.items():  # last: an encoding error must leave text and copies consistent
            self._copies[index] = copy
        return is_changed

    def _span(self, index: int) -> slice:
        """The span of line `index` in the text."""
        return slice(self._ends[index - 1] + len(_SEPARATOR) if index else len(_OPENING), self._ends[index])

    def _replace(self, texts: dict[int, bytes]) -> None:
        """Replace the texts of some lines, in one pass from the first on."""
        if not texts:
            return
        self.num_rewritten += 1
        parts: list[bytes | bytearray] = []
        ends = self._ends[: min(texts)]
        at = moved = 0
        for index in range(min(texts), len(self._ends)):
            if index in texts:
                span = self._span(index)
                parts += (self._text[at : span.start], texts[index])
                at = span.stop
                moved += len(texts[index]) - (span.stop - span.start)
            ends.append(self._ends[index] + moved)
        self._text = bytearray(b"".join((*parts, self._text[at:])))
        self._ends = ends

    def _encoded(self, line: Any) -> tuple[Any, bytes]:
        self.num_encoded += 1
        is_plain = type(line) is dict and all(
            type(name) is str and isinstance(value, (Number, str, type(None))) for name, value in line.items()
        )
        written = line
        if not is_plain and isinstance(line, Mapping):
            written, changed = plain_line(line)
            if changed and self._warn is not None:
                self._warn(changed)
        text = json.dumps(written, indent=2, sort_keys=True, default=plain_value)
        return (dict(line) if is_plain else _ALWAYS_ENCODE), (_INDENT + text.replace("\n", "\n" + _INDENT)).encode()
