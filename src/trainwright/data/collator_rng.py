"""Random generators that a collator keeps for itself, as one that masks tokens with a `seed` does.

Owns: finding them, seeding them anew for each batch in loader workers, their states for a checkpoint where no worker
runs. Leaves to others: the generators that a whole process shares (`seeding`, `batch_seeds`).

Found are torch, Python and NumPy generators in attributes of the collator, in lists and dicts there, in what it wraps
(partial, bound method, another collator) and in the variables that a function closes over; not in global variables.
"""

from __future__ import annotations

import functools
import inspect
import random
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from trainwright.names import LOOP_STATE_NAME
from trainwright.seeding import generator_state, set_generator_state

_DEPTH = 6  # a filter of columns around a partial around a collator that holds a list
_MOST_ITEMS = 64  # of a list or dict that are looked at: what holds more is data
_NAMES = ("generator", "rng", "_generator", "_rng")  # attributes that are None until the first batch needs them


@functools.cache
def _kinds() -> tuple[type, ...]:
    """Asked for when first needed: NumPy imports its generators when they are first named."""
    return torch.Generator, random.Random, np.random.Generator, np.random.RandomState


def find(collator: Any) -> dict[str, Any]:
    """Path -> generator, in a fixed order; the path of an attribute is its name."""
    return {path: value for path, value in _walk(collator, "", _DEPTH, set()) if isinstance(value, _kinds())}


def is_made_late(collator: Any) -> bool:
    """Whether the collator may make a generator, or another one in its place, when it sees its first batch."""
    return any(
        isinstance(value, _kinds()) or (value is None and path.rpartition(".")[2] in _NAMES)
        for path, value in _walk(collator, "", _DEPTH, set())
    )


def fingerprint(collator: Any) -> int:
    """A number that differs where generators were seeded differently, or a `seed` that the collator is given is."""
    found = [(path, repr(generator_state(value))) for path, value in find(collator).items()]
    seeds = [
        (path, value)
        for path, value in _walk(collator, "", _DEPTH, set())
        if path.rpartition(".")[2] == "seed" and isinstance(value, int)
    ]
    return zlib.crc32(repr((found, seeds)).encode())


def reseed(collator: Any, seed: int) -> None:
    """Seed each of the collator's generators, every one differently, from `seed`."""
    for path, generator in find(collator).items():
        derived = zlib.crc32(f"{seed} {path}".encode())
        if isinstance(generator, torch.Generator):
            generator.manual_seed(derived)
        elif isinstance(generator, np.random.Generator):
            kind: Any = type(generator.bit_generator)
            generator.bit_generator.state = kind(derived).state
        else:  # random.Random, RandomState
            generator.seed(derived)


def states(collator: Any) -> dict[str, Any] | None:
    """Path -> state of each generator, as JSON; None where there is none."""
    return {path: generator_state(generator) for path, generator in find(collator).items()} or None


def restore(collator: Any, saved: Mapping[str, Any] | str | None) -> None:
    """Put back what `states` returned. A collator that makes its generator at its first batch gets it now."""
    if saved is None:
        return
    if isinstance(saved, str):  # what earlier releases wrote: the state of the attribute `generator`
        saved = {"generator": {"kind": "torch", "state": saved}}
    found = find(collator)
    for path, state in saved.items():
        generator = found.get(path)
        # The file chooses no attribute: only one that is there, and waits for its generator, is set.
        if generator is None and path in _NAMES and inspect.getattr_static(collator, path, ...) is None:
            generator = {"torch": torch.Generator, "python": random.Random}.get(state["kind"], np.random.default_rng)()
            setattr(collator, path, generator)
        if generator is None:
            continue
        try:
            set_generator_state(generator, state)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
            raise ValueError(
                f"{LOOP_STATE_NAME} is damaged: `collator_generator` holds for {path} no state of a "
                f"{type(generator).__name__} ({error}). Use an older checkpoint."
            ) from error


def _walk(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything that may be a generator or hold one."""
    yield path, value
    if depth == 0 or id(value) in seen or isinstance(value, (*_kinds(), torch.Tensor, torch.nn.Module, type)):
        return
    seen.add(id(value))
    inner: Mapping[Any, Any] = {}
    if isinstance(value, functools.partial):
        inner = {"func": value.func, **dict(enumerate(value.args)), **value.keywords}
    elif isinstance(value, types.MethodType):
        inner = {"self": value.__self__}
    elif isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        inner = {name: cell.cell_contents for name, cell in zip(value.__code__.co_freevars, cells) if _is_filled(cell)}
    elif isinstance(value, Mapping):
        inner = value if len(value) <= _MOST_ITEMS else {}
    elif isinstance(value, (list, tuple)):
        inner = dict(enumerate(value)) if len(value) <= _MOST_ITEMS else {}
    elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
        # Class attributes too, where they wait for a generator of the instance. Runs no property's code.
        late = {name: None for name in _NAMES if inspect.getattr_static(value, name, ...) is None}
        inner = {**late, **vars(value)}
    for name, item in inner.items():
        yield from _walk(item, f"{path}.{name}" if path else str(name), depth - 1, seen)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
