"""Values of a log line as JSON holds them.

Owns: what becomes of a tensor, an array, a set, an object in the history and in `metrics.jsonl`. Leaves to others:
warning of it (`TrainerState`), writing it, and what trackers make of the value itself. Imports nothing outside the
standard library.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Set
from numbers import Real
from typing import Any

MOST_ELEMENTS = 1000  # of an array that is written out
MOST_DEPTH = 16  # of containers inside each other
MOST_CHARACTERS = 1000  # of the text of an object
LARGEST = 1.7976931348623157e308  # of a number that a float holds

_PLAIN = (str, float, bool, type(None))


def plain_line(line: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(`line` with values that JSON holds, key -> what its value was, in words, where it was none of a number, a text,
    or lists and mappings of these). A value is never dropped, and no value raises. NaN and infinity stay floats.
    """
    plain: dict[str, Any] = {}
    changed: dict[str, str] = {}
    for key, value in line.items():
        name = key if type(key) is str else str(_plain(key, 0)[0])
        if type(value) not in _PLAIN:
            value, what = _plain(value, 0)
            if what is not None:
                changed[name] = what
        plain[name] = value
    return plain, changed


def plain_value(value: Any) -> Any:
    """`value` as JSON holds it."""
    return _plain(value, 0)[0]


def _plain(value: Any, depth: int) -> tuple[Any, str | None]:
    try:
        return _converted(value, depth)
    except Exception:  # a user's object: its text, its length, its elements may raise anything
        name = type(value).__name__
        return f"<{name}>", f"a value of type {name}, which cannot be read"


def _converted(value: Any, depth: int) -> tuple[Any, str | None]:
    """(`value` for JSON, what it was; None where a reader of the file will not miss anything)."""
    if value is None or isinstance(value, bool):
        return value, None
    if isinstance(value, str):
        return str.__str__(value), None
    if isinstance(value, int):
        number = int(value)
        return (number, None) if -LARGEST <= number <= LARGEST else (_cut(hex(number)), "a number beyond every float")
    if isinstance(value, float):
        return float(value), None
    if isinstance(value, (Mapping, list, tuple)):
        if depth == MOST_DEPTH:
            return f"<{type(value).__name__}>", f"nested deeper than {MOST_DEPTH}"
        if isinstance(value, Mapping):
            named = {str(_plain(key, 0)[0]): _plain(item, depth + 1) for key, item in value.items()}
            return {key: item for key, (item, _) in named.items()}, _first(what for _, what in named.values())
        items = [_plain(item, depth + 1) for item in value]
        return [item for item, _ in items], _first(what for _, what in items)
    if hasattr(value, "shape") and hasattr(value, "tolist"):  # NumPy, torch, JAX ...
        return _array(value, depth)
    from decimal import Decimal  # its module is loaded where there is one already, or for a value as odd as that

    if isinstance(value, (Real, Decimal)):  # a fraction, a number of another library
        return float(value), None
    if isinstance(value, (bytes, bytearray)):
        return _cut(bytes(value).decode("utf-8", "backslashreplace")), "bytes"
    if isinstance(value, Set):
        items = [_plain(item, depth + 1)[0] for item in value]
        return sorted(items, key=lambda item: (type(item).__name__, item)), "a set"
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat(), f"a {type(value).__name__}"
    return _cut(str(value)), f"an object of type {type(value).__name__}"


def _array(value: Any, depth: int) -> tuple[Any, str | None]:
    num_elements = 1
    for length in value.shape:
        num_elements *= int(length)
    if num_elements == 1:
        return _plain(value.item(), depth)
    what = f"{type(value).__name__} of shape {tuple(value.shape)}"
    if num_elements > MOST_ELEMENTS:
        return f"<{what}>", f"a {what}"
    return _plain(value.tolist(), depth)[0], f"a {what}"


def _first(words: Any) -> str | None:
    """The first that is not None: a container is named after the first value in it that was changed."""
    return next((what for what in words if what is not None), None)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}... ({len(text)} characters)"
