"""A copy of a user's function whose calls leave no trace in the original.

Owns: what of a function is copied (its closure, the globals it names, the object it belongs to, and what they hold) and
what is shared: code, modules, classes, weights, data sets and objects of libraries. Leaves to others: why it is called
(`sanity_check`). What a function writes elsewhere (files, a module's attributes) is out of reach.
"""

from __future__ import annotations

import inspect
import io
import pickle
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from trainwright.metrics import StreamingMetric

_MOST_BYTES = 2**24  # of one array or model that is copied, and of everything else together
_OF_LIBRARIES = {"trainwright", "transformers", "tokenizers", "datasets", "evaluate", "accelerate", "peft"}


class CannotCopy(Exception):
    """The function holds what cannot be copied, or more than a try is worth."""


def copied(functions: Any) -> Any:
    """`functions` (any nesting of functions, methods and callable objects), to be called without changing them.

    Raises CannotCopy.
    """
    for function in functions if isinstance(functions, (tuple, list)) else [functions]:
        if inspect.ismethod(function) and _is_shared(function.__self__):
            raise CannotCopy(f"it is a method of {type(function.__self__).__name__}")
    try:
        return _Copies().of(functions)
    except CannotCopy:
        raise
    except Exception as error:  # whatever an object's way of being copied raises
        raise CannotCopy(f"{type(error).__name__}: {error}") from error


def strings_of(functions: Iterable[Any]) -> set[str]:
    """Texts in the code of `functions` and of what they call in their module: the names they may give to a metric."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [_function_of(function) for function in functions]
    while waiting:
        function = waiting.pop()
        if not isinstance(function, types.FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        held = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
        held += [function.__globals__.get(name) for name in _names_in(function.__code__)]
        found.update(_texts([list(_constants_in(function.__code__)), held]))
        waiting += [each for each in held if getattr(each, "__module__", None) == function.__module__]
    return found


class _Buffer(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + len(data) > _MOST_BYTES:
            raise CannotCopy(f"it holds more than {_MOST_BYTES >> 20} MiB")
        return super().write(data)


class _Copies:
    """Copies of several objects, in which what was one object is one object again."""

    def __init__(self) -> None:
        self._stream = _Buffer()
        self._pickler = _Pickler(self._stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._unpickler = _Unpickler(self._stream)
        self._pickler.copies = self._unpickler.copies = self
        self.shared: list[Any] = []
        self._functions: dict[int, tuple[types.FunctionType, types.FunctionType]] = {}  # by id: original, copy
        self._cells: dict[int, types.CellType] = {}
        self._globals: dict[int, dict[str, Any]] = {}
        self._to_fill: list[types.FunctionType] = []

    def of(self, thing: Any) -> Any:
        copy = self._copy(thing)
        while self._to_fill:
            self._fill(self._to_fill.pop())
        return copy

    def _copy(self, thing: Any) -> Any:
        start = self._stream.seek(0, io.SEEK_END)
        self._pickler.dump(thing)
        self._stream.seek(start)
        return self._unpickler.load()

    def of_function(self, original: types.FunctionType) -> types.FunctionType:
        """A function with the same code and new cells, which are filled later: it may refer to itself."""
        if id(original) not in self._functions:
            names = self._globals.setdefault(id(original.__globals__), dict(original.__globals__))
            cells = tuple(self._cells.setdefault(id(cell), types.CellType()) for cell in original.__closure__ or ())
            copy = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, cells)
            copy.__qualname__, copy.__module__ = original.__qualname__, original.__module__
            copy.__kwdefaults__ = original.__kwdefaults__
            self._functions[id(original)] = original, copy
            self._to_fill.append(original)
        return self._functions[id(original)][1]

    def _fill(self, original: types.FunctionType) -> None:
        copy = self._functions[id(original)][1]
        copy.__dict__.update(self._copy(original.__dict__))
        copy.__defaults__ = self._copy(original.__defaults__)
        for cell in original.__closure__ or ():
            if not _is_empty(cell) and _is_empty(self._cells[id(cell)]):
                self._cells[id(cell)].cell_contents = self._copy(cell.cell_contents)
        names = self._globals[id(original.__globals__)]
        for name in _names_in(original.__code__):
            if name in names and names[name] is original.__globals__.get(name):
                names[name] = self._copy(names[name])

    def knows(self, function: types.FunctionType) -> bool:
        """Whether `function` is of the user's module, or has no name that it could be found by."""
        return "<" in function.__qualname__ or not self._globals or id(function.__globals__) in self._globals


class _Pickler(pickle.Pickler):
    copies: _Copies

    def persistent_id(self, thing: Any) -> Any:
        if isinstance(thing, types.FunctionType) and self.copies.knows(thing):
            self.copies.shared.append(self.copies.of_function(thing))
        elif _is_shared(thing):
            self.copies.shared.append(thing)
        else:
            return None
        return len(self.copies.shared) - 1


class _Unpickler(pickle.Unpickler):
    copies: _Copies

    def persistent_load(self, place: int) -> Any:
        return self.copies.shared[place]


def _is_shared(thing: Any) -> bool:
    if isinstance(thing, (type, types.ModuleType, torch.utils.data.Dataset)):
        return True
    if isinstance(thing, (np.ndarray, torch.Tensor)):
        return thing.nbytes > _MOST_BYTES // 2
    bases = {base.__module__.partition(".")[0] for base in type(thing).__mro__}
    if bases & _OF_LIBRARIES and not isinstance(thing, StreamingMetric):
        return True
    return isinstance(thing, nn.Module) and sum(tensor.nbytes for tensor in thing.parameters()) > _MOST_BYTES // 2


def _function_of(thing: Any) -> Any:
    """The function that runs where `thing` is called: behind partials, methods, decorators and callable objects."""
    while True:
        inner = getattr(thing, "func", None) or getattr(thing, "__func__", None) or getattr(thing, "__wrapped__", None)
        if inner is None:
            break
        thing = inner
    return thing if isinstance(thing, types.FunctionType) else inspect.getattr_static(type(thing), "__call__", None)


def _is_empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _constants_in(code: types.CodeType) -> Iterator[Any]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _constants_in(constant)
        else:
            yield constant


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, (list, tuple, set, frozenset, dict)) and len(values) < 10_000:
        for value in values:
            yield from _texts(value)
