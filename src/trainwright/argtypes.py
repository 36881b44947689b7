"""Converts one text or file value to the type of an annotation.

Owns: conversion, and the wording of its errors. Leaves to others: flags and files (`argparser.py`).
Standard library only.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import inspect
import json
import types
import typing
from collections import abc
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
        ValueError: the text is no such value; the message has the valid ones.
    """
    hint = resolved(hint)
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint), enum_members)
    if origin is Literal:
        return _one_of(value, {option: option for option in typing.get_args(hint)})
    if hint in (Any, object) or isinstance(hint, typing.TypeVar):
        return parse_literal(value) if isinstance(value, str) and value.startswith(("{", "[")) else value
    if isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, hint):
            return value
        text = value.value if isinstance(value, Enum) else value
        member = _one_of(text, {member.value: member for member in hint})
        return member if enum_members or issubclass(hint, str) else member.value
    if (origin or hint) in _CONVERTERS:
        return _CONVERTERS[origin or hint](value, hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _to_dataclass(value, hint)
    if isinstance(value, str) and not is_readable(hint):
        raise ValueError(f"{value!r} cannot become {named(hint)}: {READABLE}")
    if isinstance(value, str) and isinstance(hint, type):
        return hint(value)  # a user's class that is constructed from text, as `type=` of argparse
    return value


def _convert_union(value: Any, options: tuple[Any, ...], enum_members: bool) -> Any:
    """The first member that takes the value: exact types first, then from strict (enum, number) to lax (text)."""
    if value is None and type(None) in options:
        return None
    options = tuple(resolved(option) for option in options)
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
        if lax and accepts_dict(option) and not value.startswith("{"):
            continue
        if lax and accepts_sequence(option) and not value.startswith(("[", "(", "{")):
            continue
        if isinstance(value, str) and not is_readable(option):
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
    if accepts_sequence(option):
        return 5
    order = [bool, int, float, dict]
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
    if len(typing.get_args(hint)) == 2:
        of_key, of_value = typing.get_args(hint)
        if of_value in (Any, object):  # a text in it is not to be read once more
            return {convert(key, of_key): item for key, item in found.items()}
        return {convert(key, of_key): convert(item, of_value) for key, item in found.items()}
    return found


def _to_dataclass(value: Any, hint: Any) -> Any:
    """A nested dataclass from a dict, or from JSON text, of its fields."""
    if isinstance(value, hint):
        return value
    found = _to_dict(value, dict)
    hints = typing.get_type_hints(hint)
    known = [field.name for field in dataclasses.fields(hint) if field.init]
    for name in found:
        if name not in known:
            raise ValueError(f"{hint.__name__} has no field {name!r}; it has {', '.join(known)}")
    return hint(**{name: convert(item, hints[name]) for name, item in found.items()})


def _to_sequence(value: Any, hint: Any) -> Any:
    kind = typing.get_origin(hint) or hint
    opening = ("[", "(", "{") if SEQUENCES[kind] in (set, frozenset) else ("[", "(")
    found = parse_literal(value) if isinstance(value, str) and value.startswith(opening) else value
    items = list(found) if isinstance(found, (list, tuple, set, frozenset, collections.deque)) else [found]
    elements = typing.get_args(hint)
    if kind is tuple and elements and elements[-1] is not ... and len(items) != len(elements):
        raise ValueError(f"{value!r} has {len(items)} values, not the {len(elements)} of {named(hint)}")
    elements = tuple(element for element in elements if element is not ...)
    if elements:
        items = [convert(item, elements[min(index, len(elements) - 1)]) for index, item in enumerate(items)]
    return SEQUENCES[kind](items)


def _to_text(value: Any, hint: Any) -> Any:
    return str(value) if isinstance(value, (int, float, Path)) and not isinstance(value, bool) else value


# What several words become, by the annotation: an abstract class as the plainest that fulfils it.
SEQUENCES: dict[Any, Callable[[Any], Any]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    collections.deque: collections.deque,
    **dict.fromkeys((abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable, abc.Container), list),
    **dict.fromkeys((abc.Set, abc.MutableSet), set),
}
_DICTS = (dict, abc.Mapping, abc.MutableMapping)
_CONVERTERS: dict[Any, Callable[[Any, Any], Any]] = {
    bool: _to_bool,
    int: _to_number,
    float: _to_number,
    str: _to_text,
    Path: lambda value, hint: Path(value),
    **dict.fromkeys(_DICTS, _to_dict),
    **dict.fromkeys(SEQUENCES, _to_sequence),
}
READABLE = (
    "what can be written are bool, int, float, str, Path, an Enum, Literal, classes that are constructed from one "
    "text, dataclasses and dicts as JSON, lists, tuples and sets of these, and Optional or Union of these"
)


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


def resolved(hint: Any) -> Any:
    """The annotation behind a NewType, an Annotated, a Final, an InitVar, a `type` statement."""
    while True:
        if isinstance(hint, dataclasses.InitVar):
            hint = hint.type
        elif hasattr(hint, "__supertype__") or type(hint).__name__ == "TypeAliasType":
            hint = getattr(hint, "__supertype__", None) or hint.__value__
        elif typing.get_origin(hint) in (typing.Final, typing.Annotated):
            hint = typing.get_args(hint)[0]
        else:
            return hint


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself, without None."""
    hint = resolved(hint)
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(resolved(option) for option in options if option is not type(None))


def named(hint: Any) -> str:
    """An annotation as text, for messages."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def is_readable(hint: Any) -> bool:
    """Whether some text becomes such a value: of a union, whether it becomes one of its members."""
    return any(_is_readable(option) for option in members(hint))


def _is_readable(option: Any) -> bool:
    kind = typing.get_origin(option) or option
    if kind is Literal or option in (Any, object) or isinstance(option, typing.TypeVar):
        return True
    if kind in _CONVERTERS:
        return all(is_readable(argument) for argument in typing.get_args(option) if argument is not ...)
    if not isinstance(kind, type) or kind in (type, bytes, bytearray, abc.Callable) or inspect.isabstract(kind):
        return False
    return not getattr(kind, "_is_protocol", False)


def argparse_type(hint: Any) -> Any:
    """What a flag shows as its `type`: the class of one word, or None where it takes a function to convert it."""
    options = members(hint)
    if len(options) == 2 and str in options:
        options = tuple(option for option in options if option is not str)
        if accepts_dict(options[0]):
            return str
    (option, *others) = options
    if others or option in (Any, object, bool) or isinstance(option, typing.TypeVar):
        return None
    if accepts_sequence(option):
        elements = [argument for argument in typing.get_args(option) if argument is not ...]
        if len(elements) != 1:
            return str
        return elements[0] if _is_enum(elements[0]) else argparse_type(elements[0])
    return None if typing.get_origin(option) is Literal or _is_enum(option) or not callable(option) else option


def choices_of(hint: Any) -> Any:
    """The values that an Enum (list) or a Literal (tuple) allows; None for any other annotation."""
    for option in members(hint):
        if typing.get_origin(option) is Literal:
            return typing.get_args(option)
        if _is_enum(option):
            return [member.value for member in option]
    return None


def _is_enum(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, Enum)


def is_boolean(hint: Any) -> bool:
    """`bool` or `bool | None`."""
    return members(hint) == (bool,)


def is_switch_or_text(hint: Any) -> bool:
    """Booleans and texts, where the flag alone is True."""
    return set(members(hint)) == {bool, str}


def accepts_dict(hint: Any) -> bool:
    """Whether a dict is among what the annotation allows, or a dataclass, which is written as one."""
    return any((typing.get_origin(one) or one) in _DICTS or dataclasses.is_dataclass(one) for one in members(hint))


def accepts_sequence(hint: Any) -> bool:
    """Whether several words may be one value: a list, a tuple, a set is among what the annotation allows."""
    return any((typing.get_origin(option) or option) in SEQUENCES for option in members(hint))


def describe(hint: Any) -> str:
    """What `--help` shows for the value: INT, NUMBER, TEXT, JSON, {a,b}."""
    options = members(hint)
    for option in options:
        if typing.get_origin(option) is Literal:
            return "{" + ",".join(map(str, typing.get_args(option))) + "}"
        if isinstance(option, type) and issubclass(option, Enum):
            return "NAME" if len(option) > 8 else "{" + ",".join(str(member.value) for member in option) + "}"
    words = {bool: "{true,false}", int: "INT", float: "NUMBER"}
    kinds = [typing.get_origin(option) or option for option in options]
    if accepts_dict(hint):
        return "JSON"
    return next((word for kind, word in words.items() if kind in kinds and str not in kinds), "TEXT")
