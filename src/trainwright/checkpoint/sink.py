"""Whether a file of a checkpoint is written now, or handed to whoever writes it while training goes on.

Owns: knowing whether somebody takes the files of the save that is being made, and what is to be deleted after it.
Leaves to others: who that is (snapshot.py, asynchronous.py), what stands in the files and writing those that nobody
takes (save.py, weights.py).

The hooks that write (`_save`, `_save_optimizer_and_scheduler` ...) are public: they are given a directory and nothing
else, so who takes the files cannot be one of their arguments and is known here instead, while one save is made.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

Path = str | os.PathLike[str]


class Taker(Protocol):
    """Takes the content of a file as it is at this moment."""

    def take(self, kind: str, path: Path, content: Any, metadata: dict[str, str] | None = None) -> bool:
        """Take `content`, to be written to `path` later. False: it must be written now."""
        ...


# Of the save that this thread makes: its `taker`, and `frozen` (`frozen.FrozenFiles`); who is to `delete` after it.
_scope = threading.local()


@contextmanager
def taking(taker: Taker | None, frozen: Any = None) -> Iterator[None]:
    """Within, what this thread writes of a checkpoint is offered to `taker` first; None: all is written now.

    `frozen` (`frozen.FrozenFiles`) knows which weights are not written at all; None: all are.
    """
    before = getattr(_scope, "taker", None), frozen_files()
    _scope.taker, _scope.frozen = taker, frozen
    try:
        yield
    finally:
        _scope.taker, _scope.frozen = before


@contextmanager
def deleting(delete: Callable[[str], bool]) -> Iterator[None]:
    """Within, what this thread deletes is offered to `delete` first, which says whether it will see to it."""
    before = getattr(_scope, "delete", None)
    _scope.delete = delete
    try:
        yield
    finally:
        _scope.delete = before


def deleted(path: str) -> bool:
    """Whether somebody deletes the directory `path`, which has lost its name already; if not, the caller does."""
    delete = getattr(_scope, "delete", None)
    return delete is not None and bool(delete(path))


@contextmanager
def at_once(is_wanted: bool = True) -> Iterator[None]:
    """Within, files are written before the call returns, each whole, where `is_wanted`."""
    with taking(None) if is_wanted else nullcontext():
        yield


def frozen_files() -> Any:
    """The `frozen.FrozenFiles` of the checkpoint that this thread saves, or None."""
    return getattr(_scope, "frozen", None)


def taken(kind: str, path: Path, content: Any, metadata: dict[str, str] | None = None) -> bool:
    """Whether somebody took this file of a checkpoint; if not, the caller writes it. Kinds: see writer.py."""
    taker = getattr(_scope, "taker", None)
    return taker is not None and taker.take(kind, path, content, metadata)


@contextmanager
def weights_of(model: Any, write: Callable[[Any, Path, dict[str, str] | None], None]) -> Iterator[None]:
    """Around `model.save_pretrained`: have `write(tensors, path, metadata)` write its tensors, while a checkpoint is
    saved from which somebody takes files or leaves frozen weights out.

    The library prepares them (names, shards, ties) and writes its small files itself. Only the function that it
    imported from safetensors is replaced, and only for this thread. A class that brings its own `save_pretrained` may
    do anything with what it wrote, and writes at once.
    """
    module = _library_that_saves(model)
    thread = threading.get_ident()
    if module is None or (getattr(_scope, "taker", None) is None and frozen_files() is None):
        yield
        return
    original: Callable[..., None] = module.safe_save_file

    def save(tensors: Any, filename: Path, metadata: dict[str, str] | None = None) -> None:
        if threading.get_ident() == thread:
            write(tensors, filename, metadata)
        else:
            original(tensors, filename, metadata=metadata)

    module.safe_save_file = save
    try:
        yield
    finally:
        module.safe_save_file = original


def _library_that_saves(model: Any) -> Any:
    """The module of `transformers` or peft whose `save_pretrained` this model runs; None for one of its own."""
    owner = next((cls for cls in type(model).__mro__ if "save_pretrained" in vars(cls)), None)
    module = sys.modules.get(owner.__module__) if owner is not None else None
    known = owner is not None and owner.__module__ in ("transformers.modeling_utils", "peft.peft_model")
    return module if known and "save_pretrained" not in vars(model) and hasattr(module, "safe_save_file") else None
