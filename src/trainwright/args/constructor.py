"""What a call of the arguments' constructor may pass, before any field is set.

Owns: `ArgumentsMeta`, which translates older names, keeps twin names in agreement and refuses misspelt ones, for
`TrainingArguments` and every subclass (their generated `__init__` included). Leaves to others: the table of names
(`renamed.py`), the values (each topic's file).
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from trainwright.args.renamed import OF_OTHERS, RENAMED, RENAMED_VALUES, TWINS, Renamed, twin_value
from trainwright.names import closest
from trainwright.redact import is_hidden, is_secret, without_passwords

_OUR_FILES = str(Path(__file__).parent.parent)  # frames in this package, dataclasses and generated code are no callers


class ArgumentsMeta(type):
    """Metaclass of all arguments: `cls(...)` goes through `accept()`; `inspect.signature(cls)` shows the fields."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        parameters = cls.__signature__.parameters
        open_ended = {p.kind for p in parameters.values()} & {
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        }
        positional = list(parameters)[: len(args)]
        if len(args) <= len(parameters) and not open_ended and not set(positional) & set(kwargs):
            args, kwargs = (), {**dict(zip(positional, args)), **kwargs}
        given = accept(cls, kwargs)
        if not open_ended:
            unknown = [name for name in given if name not in parameters]
            if unknown:
                hints = "".join(_meant(name, list(parameters)) for name in unknown)
                raise TypeError(f"{cls.__name__} has no argument {', '.join(map(repr, unknown))}.{hints}")
        return super().__call__(*args, **given)

    def __setattr__(cls, name: str, value: Any) -> None:
        """`@dataclass` gives each subclass a `__repr__`, which would show its secrets: the inherited one stays."""
        if name == "__repr__" and _is_generated(value):
            inherited = next((base.__dict__[name] for base in cls.__mro__ if name in base.__dict__), object.__repr__)
            if inherited is not object.__repr__ and not _is_generated(inherited):
                return
        super().__setattr__(name, value)

    @property
    def __signature__(cls) -> inspect.Signature:
        """What the constructor accepts; computed once per class."""
        cached = cls.__dict__.get("_signature")
        if cached is None:
            signature = inspect.signature(cls.__init__)  # type: ignore[misc]
            cached = signature.replace(parameters=list(signature.parameters.values())[1:])
            cls._signature = cached
        return cached  # type: ignore[no-any-return]


def _meant(name: str, current: list[str]) -> str:
    """The hint about a name that is no argument: a current one, also where an older one is a little nearer."""
    if name in OF_OTHERS and OF_OTHERS[name] in current:
        return f" Did you mean {OF_OTHERS[name]!r}?"
    if not (nearest := closest(name, [*current, *RENAMED])):
        return ""
    older = nearest.split("'")[1]
    if older in current or older not in RENAMED:
        return nearest
    return f" Did you mean {RENAMED[older].instead}, once called {older!r}?"


def accept(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call under their current names; warns once for every older name that was used."""
    given = {name: None if is_hidden(name, value) else value for name, value in given.items()}
    defaults = _defaults(cls)
    changed = _changed_by_replace([name for name in given if name in defaults], list(defaults))
    for name in [name for name in given if name in RENAMED]:
        _apply(RENAMED[name], given, defaults, changed, cls)
    for (name, older), (newer, gone_by) in RENAMED_VALUES.items():
        if given.get(name) == older and isinstance(given[name], str):
            given[name] = newer
            _warn(f"{name}={older!r} is outdated (not in transformers {gone_by}); use {name}={newer!r}.")
    for older, newer in TWINS:
        if newer in defaults:
            _agree(older, newer, given, defaults, changed)
    return given


def _changed_by_replace(passed: list[str], fields: list[str]) -> frozenset[str]:
    """The fields that a call of `dataclasses.replace` changes: it passes every field, the changed ones first.

    Empty for any other call: one that leaves fields out, or that passes all of them in their order (a parser, a loaded
    dict). All but a few for a dict in another order, such as a sorted one: there both of two names count as changed.
    """
    if len(passed) != len(fields):
        return frozenset()
    place = {name: index for index, name in enumerate(fields)}
    start = len(passed) - 1
    while start > 0 and place[passed[start - 1]] < place[passed[start]]:
        start -= 1
    return frozenset(passed[:start])


def _apply(row: Renamed, given: dict[str, Any], defaults: dict[str, Any], changed: frozenset[str], cls: type) -> None:
    """Carry one older argument over into `given`."""
    is_field = row.old in defaults
    if is_field and row.old not in _documented_fields(cls):
        return  # a subclass brought its own field of that name
    value = given[row.old] if is_field else given.pop(row.old)
    used = value is not None and not (is_field and value == defaults[row.old])
    newer = row.translate(value, given)
    differing = [name for name, wanted in newer.items() if name in given and given[name] != wanted]
    if is_field and differing and (row.old in changed) != (differing[0] in changed):  # replace() changed one of the two
        if differing[0] in changed:
            given[row.old] = defaults[row.old]  # the newer one: reset the older
            return
        given.update({name: defaults[name] if wanted is None else wanted for name, wanted in newer.items()})
    elif not used or (is_field and newer and not differing and newer.keys() <= given.keys()):
        return  # not asked for, or both names say the same
    else:
        for name in differing:
            if not row.merges and given[name] != defaults.get(name):
                older, other = (f"{key}={_shown(key, given.get(key, value))}" for key in (row.old, name))
                raise ValueError(f"{older} and {other} contradict each other: drop {row.old}, the older name.")
        given.update(newer)
    if used:
        instead = row.instead.replace("...", _shown(row.old, value))
        _warn(f"The argument {row.old!r} is outdated (not in transformers {row.gone_by}); use {instead}.")


def _agree(older: str, newer: str, given: dict[str, Any], defaults: dict[str, Any], changed: frozenset[str]) -> None:
    """Make two names of one setting agree in `given`; the one that was passed sets the other."""
    if older not in given and newer not in given:
        return

    def differs(name: str, twin: str) -> bool:
        if name in given and given[name] is None:
            return False  # unset
        return bool(twin_value(name, given[name], given.get(twin, defaults[twin])) != given.get(twin, defaults[twin]))

    if older in given and newer in given:
        if not differs(older, newer) and not differs(newer, older):
            return
        if (older in changed) != (newer in changed):
            source = older if older in changed else newer
        elif given[newer] in (None, defaults[newer]):
            source = older
        elif given[older] in (None, defaults[older]):
            source = newer
        elif differs(older, newer):
            raise ValueError(
                f"{older}={given[older]!r} and {newer}={given[newer]!r} contradict each other: keep one of them."
            )
        else:
            return
    else:
        source = older if older in given else newer
    twin = newer if source == older else older
    if given[source] is not None or changed:
        given[twin] = twin_value(source, given[source], given.get(twin, defaults[twin]))


def _defaults(cls: type) -> dict[str, Any]:
    """Default of every field that the constructor takes."""
    found = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.init:
            found[field.name] = field.default_factory() if callable(field.default_factory) else field.default
    return found


def _documented_fields(cls: type) -> set[str]:
    """Fields that came with this package, not with a subclass of it."""
    ours = [
        base for base in cls.__mro__ if base.__module__.startswith("trainwright.") and dataclasses.is_dataclass(base)
    ]
    return {field.name for base in ours for field in dataclasses.fields(base)}


def _shown(name: str, value: Any) -> str:
    return "<hidden>" if is_secret(name) else without_passwords(repr(value))


def _is_generated(function: Any) -> bool:
    """Whether `dataclass` generated this `__repr__`."""
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    return code is not None and code.co_filename == "<string>"


def _warn(message: str) -> None:
    """A FutureWarning that points at the line of the user's call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_back is not None:
        file = frame.f_code.co_filename
        if not (file.startswith((_OUR_FILES, "<string>")) or file == dataclasses.__file__):
            break
        frame = frame.f_back
    assert frame is not None
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__", "__main__")
    warnings.warn_explicit(message, FutureWarning, frame.f_code.co_filename, frame.f_lineno, module, registry)
