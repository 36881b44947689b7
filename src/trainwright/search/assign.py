"""Write a trial's values into the arguments, as the type that each field declares.

Owns: `apply_trial` and `cast`. Leaves to others: where the values come from, and what must be rebuilt afterwards.
"""

from __future__ import annotations

import functools
import logging
import types
import typing
from enum import Enum
from typing import Any

from trainwright.names import closest

logger = logging.getLogger(__name__)

_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def apply_trial(args: Any, params: dict[str, Any]) -> None:
    """Set each hyper-parameter of `params` on `args`, converted to the type of its field.

    A name that `args` does not have is reported and skipped: it may be meant for `model_init`. All values are converted
    before the first is set, so that a bad one (ValueError naming field, value and type) leaves `args` as they were.
    """
    args_class: Any = type(args)
    field_types = _field_types(args_class)
    converted = {}
    for name, value in params.items():
        if not hasattr(args, name):
            logger.warning(
                "Hyper-parameter %r is not a field of %s, so the arguments stay as they are.%s",
                name,
                type(args).__name__,
                closest(name, [n for n in dir(args) if not n.startswith("_")]),
            )
            continue
        converted[name] = cast(name, value, field_types.get(name), getattr(args, name))
    for name, value in converted.items():
        setattr(args, name, value)


def cast(name: str, value: Any, declared: Any, current: Any = None) -> Any:
    """`value` as the type that the field `name` declares; where it declares none, as the type of its `current` value.

    The declared type comes first: a field of type float often holds the int 0, and `int(0.1)` is 0.
    """
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a NumPy or torch scalar
    options = _options(declared) if declared is not None else _options_like(current)
    if value is None and options and type(None) not in options:
        raise _mismatch(name, value, options)
    if value is None or not options:
        return value
    for option in options:
        if isinstance(option, type) and issubclass(option, Enum):
            return option(value)  # before `str`, which such a union usually has; its error lists the members
    if type(value) in options:
        return value
    for convert in (_as_bool, _as_int, _as_float, _as_str):
        result = convert(value, options)
        if result is not None:
            return result
    if isinstance(value, (bool, int, float, str)) and not any(_takes_anything(option) for option in options):
        raise _mismatch(name, value, options)
    return value  # a dict, a list or an object: no conversion would be a better guess than the user's own value


def _as_bool(value: Any, options: tuple[Any, ...]) -> bool | None:
    if bool not in options:
        return None
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return bool(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def _as_int(value: Any, options: tuple[Any, ...]) -> int | None:
    if int not in options or isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return int(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _as_float(value: Any, options: tuple[Any, ...]) -> float | None:
    if float not in options or isinstance(value, bool):
        return None
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None


def _as_str(value: Any, options: tuple[Any, ...]) -> str | None:
    return str(value) if str in options and isinstance(value, (int, float)) else None


def _options(declared: Any) -> tuple[Any, ...]:
    """The plain types that an annotation allows: `Union[Kind, str, None]` gives (Kind, str, NoneType)."""
    origin = typing.get_origin(declared)
    if origin is typing.Union or origin is types.UnionType:
        return tuple(option for part in typing.get_args(declared) for option in _options(part))
    if origin is typing.Literal:
        return tuple({type(choice) for choice in typing.get_args(declared)})
    if origin is typing.Annotated:
        return _options(typing.get_args(declared)[0])
    return (origin or declared,)


def _options_like(current: Any) -> tuple[Any, ...]:
    if current is None:
        return ()
    return (int, float) if type(current) is int else (type(current),)


def _takes_anything(option: Any) -> bool:
    return option is Any or option is object or not isinstance(option, type)


@functools.cache
def _field_types(args_class: Any) -> dict[str, Any]:
    """Name -> annotation of every field; a class whose annotations do not resolve contributes none."""
    hints: dict[str, Any] = {}
    for base in reversed(args_class.__mro__):
        try:
            hints.update(typing.get_type_hints(base))
        except (NameError, TypeError):  # a name that is imported for type checkers only
            continue
    return hints


def _mismatch(name: str, value: Any, options: tuple[Any, ...]) -> ValueError:
    allowed = " or ".join("None" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    return ValueError(f"Hyper-parameter {name}={value!r} does not fit the field {name!r}, which takes {allowed}.")
