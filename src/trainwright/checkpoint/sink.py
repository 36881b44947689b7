"""Where each file of a checkpoint goes: to the disk now, or to the background writer.

Owns: which `Sink` belongs to which directory, writing one file, having a library's `save_pretrained` use both. Leaves
to others: the snapshot that the background writer reads (snapshot.py), what the files hold (save.py, weights.py).

The hooks that write (`_save`, `_save_optimizer_and_scheduler` ...) are public and given a directory and nothing else,
so the directory in which a checkpoint is staged is the key to its sink.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from safetensors.torch import save_file as save_file
from torch import nn

if TYPE_CHECKING:
    from trainwright.checkpoint.frozen import FrozenFiles

Path = str | os.PathLike[str]
Tensors = dict[str, torch.Tensor]
Value = TypeVar("Value")


class WeightsFile(NamedTuple):
    """A safetensors file to write."""

    path: str
    tensors: Tensors
    metadata: dict[str, str] | None


class Snapshot(Protocol):
    """Copies the content of files as it is at this moment, for the background writer."""

    def add(self, kind: str, path: Path, content: Any, metadata: dict[str, str] | None = None) -> bool:
        """Copy `content`, to be written to `path` later. False: it must be written now."""
        ...


class Sink:
    """Of one checkpoint: its `snapshot` (None: every file is written now), and `frozen`, which knows the weights that
    an earlier checkpoint holds already (None: all are written).
    """

    def __init__(self, snapshot: Snapshot | None = None, frozen: FrozenFiles | None = None) -> None:
        self.snapshot, self.frozen = snapshot, frozen

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Within, each file is written whole before the call returns: a user's hook may read what it wrote."""
        before = self.snapshot, self.frozen
        self.snapshot = self.frozen = None
        try:
            yield
        finally:
            self.snapshot, self.frozen = before

    def write_weights(
        self, model: nn.Module, tensors: Tensors, path: Path, metadata: dict[str, str] | None = None
    ) -> None:
        """A safetensors file with weights of `model`, but for what an earlier checkpoint holds."""
        whole = WeightsFile(os.fspath(path), tensors, metadata)
        for file in [whole] if self.frozen is None else self.frozen.left_to_write(model, whole):
            write("tensors", *file)


_ON_DISK = Sink()
_sinks: dict[str, Sink] = {}  # by the directory in which a checkpoint is staged


@contextmanager
def opened(directory: str, sink: Sink) -> Iterator[None]:
    """Within, files of `directory` (an absolute path) go where `sink` says."""
    _sinks[directory] = sink
    try:
        yield
    finally:
        del _sinks[directory]


def of(path: Path) -> Sink:
    """The sink of a directory, or of a file in it at any depth. Of any other, one that writes now."""
    return _of_ancestor(_sinks, path) or _ON_DISK


def write(kind: str, path: Path, content: Any, metadata: dict[str, str] | None = None) -> bool:
    """Write one file of a checkpoint, or have the background writer do it; whether it was written now. Kinds: see
    `write_now`.
    """
    snapshot = of(path).snapshot if _sinks else None
    if snapshot is not None and snapshot.add(kind, path, content, metadata):
        return False
    write_now(kind, path, content, metadata)
    return True


def write_now(kind: str, path: Path, content: Any, metadata: dict[str, str] | None = None) -> None:
    """Write one file. `kind`: "torch" or "object" (`torch.save`), "tensors" (safetensors, with `metadata`), "json",
    "log" (a `StateText`).
    """
    if kind in ("torch", "object"):
        torch.save(content, path)
    elif kind == "log":
        content.write(path)
    elif kind == "tensors":
        save_file(content, path, metadata=metadata)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")


# -- libraries whose models write themselves ---------------------------------------------------------------------------

WriteWeights = Callable[[Tensors, Path, dict[str, str] | None], None]

_lock = threading.Lock()
_redirected: dict[str, WriteWeights] = {}  # by the directory of a checkpoint
_replaced: dict[Any, Callable[..., None]] = {}  # module -> its `safe_save_file`, while anything is redirected


@contextmanager
def redirected(model: nn.Module, directory: Path) -> Iterator[None]:
    """Around `model.save_pretrained(directory)`: its tensors go into the sink of `directory`, if that has one.

    The library prepares them (names, shards, ties) and writes its small files itself. Only the function that it
    imported from safetensors is replaced, and that leaves every other directory alone. A class that brings its own
    `save_pretrained` may do anything with what it wrote, and writes at once.
    """
    module, sink, key = _library_that_saves(model), of(directory), os.path.abspath(directory)
    if module is None or (sink.snapshot is None and sink.frozen is None):
        yield
        return
    with _lock:
        if module not in _replaced:
            _replaced[module] = module.safe_save_file
            module.safe_save_file = _redirecting(module.safe_save_file)
        _redirected[key] = lambda tensors, path, metadata: sink.write_weights(model, tensors, path, metadata)
    try:
        yield
    finally:
        with _lock:
            del _redirected[key]
            while not _redirected and _replaced:
                replaced, original = _replaced.popitem()
                replaced.safe_save_file = original


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep `transformers`, where it is loaded, from drawing a bar over files, which would break the bar of the run."""
    library: Any = sys.modules.get("transformers.utils.logging")
    if library is None or not library.is_progress_bar_enabled():
        yield
        return
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.enable_progress_bar()


def _redirecting(original: Callable[..., None]) -> Callable[..., None]:
    def save(tensors: Tensors, filename: Path, metadata: dict[str, str] | None = None) -> None:
        write_weights = _of_ancestor(_redirected, filename)
        if write_weights is None:
            original(tensors, filename, metadata=metadata)
        else:
            write_weights(tensors, filename, metadata)

    return save


def _of_ancestor(values: Mapping[str, Value], path: Path) -> Value | None:
    """Of `values`, by directory, the one whose directory is `path` or holds it."""
    if not values:
        return None
    absolute = os.path.abspath(path)
    found = (values.get(directory) for directory in list(values) if _holds(directory, absolute))
    return next(found, None)


def _holds(directory: str, path: str) -> bool:
    return path == directory or path.startswith(directory + os.sep)


def _library_that_saves(model: Any) -> Any:
    """The module of `transformers` or peft whose `save_pretrained` this model runs; None for one of its own."""
    owner = next((cls for cls in type(model).__mro__ if "save_pretrained" in vars(cls)), None)
    module = sys.modules.get(owner.__module__) if owner is not None else None
    known = owner is not None and owner.__module__ in ("transformers.modeling_utils", "peft.peft_model")
    return module if known and "save_pretrained" not in vars(model) and hasattr(module, "safe_save_file") else None
