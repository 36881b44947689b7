"""One text or file value into the type that an annotation names.

Owns: conversion, and the wording of "this is no float". Leaves to others: flags and files (`argparser.py`).
Standard library only.
"""

from __future__ import annotations

import ast
import json
import types
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

TRUE_WORDS, FALSE_WORDS = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def convert(value: Any, hint: Any, enum_members: bool = True) -> Any:
    """`value` as the annotation `hint` says.

    Args:
        value: text from a command line, or what a JSON or YAML file held.
        enum_members: return members of plain enums; else their values. Members that are texts compare equal to their
            value, so those are returned in any case.

    Raises:
        ValueError: the text does not spell such a value; the message says what would.
    """
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint), enum_members)
    if origin is Literal:
        return _one_of(value, {option: option for option in typing.get_args(hint)})
    if hint is Any or isinstance(hint, typing.TypeVar):
        return parse_literal(value) if isinstance(value, str) and value.startswith(("{", "[")) else value
    if isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, hint):
            return value
        text = value.value if isinstance(value, Enum) else value
        member = _one_of(text, {member.value: member for member in hint})
        return member if enum_members or issubclass(hint, str) else member.value
    if (origin or hint) in _CONVERTERS:
        return _CONVERTERS[origin or hint](value, hint)
    if isinstance(value, str) and isinstance(hint, type):
        return hint(value)  # a class of the user's that reads itself from text, as `type=` of argparse
    return value


def _convert_union(value: Any, options: tuple[Any, ...], enum_members: bool) -> Any:
    """The first member that takes the value: exact types first, then from strict (enum, number) to lax (text)."""
    if value is None and type(None) in options:
        return None
    if not isinstance(value, str):
        if any(type(value) is (typing.get_origin(option) or option) for option in options):
            exact = next(option for option in options if type(value) is (typing.get_origin(option) or option))
            return convert(value, exact, enum_members)
    elif type(None) in options:
        if value == "None" or (value.lower() in ("none", "null") and str not in options):
            return None
    problem = None
    for option in sorted((option for option in options if option is not type(None)), key=_strictness):
        lax = str in options and isinstance(value, str)
        if lax and option is bool and value.lower() not in ("true", "false"):
            continue  # where text is allowed, "y" or "1" is text
        if lax and (typing.get_origin(option) or option) in (dict, list) and not value.startswith(("{", "[")):
            continue
        if not isinstance(value, str) and option is str:
            continue
        try:
            return convert(value, option, enum_members)
        except (TypeError, ValueError) as error:
            problem = problem or error
    if not isinstance(value, str):
        return value  # an object; the dataclass decides
    raise problem or ValueError(f"{value!r} fits none of {options}")


def _strictness(option: Any) -> int:
    kind = typing.get_origin(option) or option
    if kind is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return 0
    order = [bool, int, float, dict, list, tuple, Path]
    return 1 + order.index(kind) if kind in order else (98 if kind is not str else 99)


def _one_of(value: Any, options: dict[Any, Any]) -> Any:
    for key, result in options.items():
        if value == key or str(value) == str(key):
            return result
    raise ValueError(f"{value!r} is not one of {list(options)}")


def _to_bool(value: Any, hint: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in TRUE_WORDS or word in FALSE_WORDS:
        return word in TRUE_WORDS
    raise ValueError(f"{value!r} is neither true nor false; write one of {', '.join(TRUE_WORDS + FALSE_WORDS)}")


def _to_number(value: Any, hint: Any) -> Any:
    if not isinstance(value, str):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{value!r} is a {type(value).__name__}, not {_ARTICLE[hint]}")
        return hint(value) if hint is not int or value == int(value) else _refuse(value, hint)
    try:
        return hint(value)
    except ValueError:
        pass
    try:
        number = float(value)  # "1e3" and "3.0" are whole numbers, too
    except ValueError:
        return _refuse(value, hint)
    return int(number) if number.is_integer() else _refuse(value, hint)


_ARTICLE = {int: "a whole number", float: "a number"}


def _refuse(value: Any, hint: Any) -> Any:
    raise ValueError(f"{value!r} is not {_ARTICLE[hint]}")


def _to_dict(value: Any, hint: Any) -> Any:
    found = parse_literal(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise ValueError(f"{value!r} is no dict; write JSON such as '{{\"key\": 1}}'")
    return found


def _to_sequence(value: Any, hint: Any) -> Any:
    found = parse_literal(value) if isinstance(value, str) and value.startswith(("[", "(")) else value
    items = list(found) if isinstance(found, (list, tuple)) else [found]
    elements = [argument for argument in typing.get_args(hint) if argument is not ...]
    if elements:
        items = [convert(item, elements[min(index, len(elements) - 1)]) for index, item in enumerate(items)]
    return tuple(items) if (typing.get_origin(hint) or hint) is tuple else items


def _to_text(value: Any, hint: Any) -> Any:
    return str(value) if isinstance(value, (int, float, Path)) and not isinstance(value, bool) else value


_CONVERTERS: dict[Any, Callable[[Any, Any], Any]] = {
    bool: _to_bool,
    int: _to_number,
    float: _to_number,
    dict: _to_dict,
    list: _to_sequence,
    tuple: _to_sequence,
    str: _to_text,
    Path: lambda value, hint: Path(value),
}


def parse_literal(text: str) -> Any:
    """A word as JSON or Python would read it (`true`, `1e-5`, `[1, 2]`, `{'a': None}`); any other word stays text."""
    named = {"true": True, "false": False, "none": None, "null": None}
    if text.strip().lower() in named:
        return named[text.strip().lower()]
    for read in (json.loads, ast.literal_eval, float):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself, without None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(option for option in options if option is not type(None))


def is_boolean(hint: Any) -> bool:
    """`bool` or `bool | None`."""
    return _members(hint) == (bool,)


def accepts_dict(hint: Any) -> bool:
    """Whether a dict is among what the annotation allows."""
    return any((typing.get_origin(option) or option) is dict for option in _members(hint))


def accepts_sequence(hint: Any) -> bool:
    """Whether several words may be one value: a list or tuple is among what the annotation allows."""
    return any((typing.get_origin(option) or option) in (list, tuple) for option in _members(hint))


def describe(hint: Any) -> str:
    """What `--help` shows for the value: INT, NUMBER, TEXT, JSON, {a,b}."""
    options = _members(hint)
    for option in options:
        if typing.get_origin(option) is Literal:
            return "{" + ",".join(map(str, typing.get_args(option))) + "}"
        if isinstance(option, type) and issubclass(option, Enum):
            return "NAME" if len(option) > 8 else "{" + ",".join(str(member.value) for member in option) + "}"
    words = {bool: "{true,false}", int: "INT", float: "NUMBER"}
    kinds = [typing.get_origin(option) or option for option in options]
    if dict in kinds:
        return "JSON"
    return next((word for kind, word in words.items() if kind in kinds and str not in kinds), "TEXT")
