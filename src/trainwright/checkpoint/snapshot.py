"""The state of a run as it is at one moment, copied into shared memory: what a save waits for.

Owns: taking files apart into tensors (copied byte by byte) and the rest (pickled, small), and putting them together
again. Leaves to others: the memory (shared_memory.py), which files there are (save.py), writing them (writer.py).

Storages are copied whole and once each, so tensors that share memory still do when they are read, and `torch.save`
writes the same bytes as it would have here. How a file was taken apart is remembered (snapshot_layout.py) while its
tensors keep their places, shapes and types, so that a save costs little more than the copy.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
from dataclasses import dataclass, field
from typing import Any

import torch

from trainwright.checkpoint.shared_memory import Arena, Place
from trainwright.checkpoint.snapshot_layout import (
    Copy,
    Description,
    NotPlain,
    SnapshotLayout,
    StorageKey,
    copy_within_host,
    described_as,
    layout_of,
)
from trainwright.log_text import SMALL_BYTES, StateText
from trainwright.nonfinite.weights import nonfinite_tensors

logger = logging.getLogger(__name__)

# Where a class or function may come from. A user's class may be in a script that must not run a second time; of those
# of torch only these are read back without a word (save.py warns of the others when it writes a file itself).
_KNOWN = frozenset(("builtins", "collections", "numpy"))
_KNOWN_TO_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_KNOWN_OBJECTS = _KNOWN | {"copyreg", "enum", "trainwright"}  # in `training_args.bin`, which is never read by us


@dataclass
class FileSnapshot:
    """One file of a checkpoint; the bytes of its tensors are in shared memory."""

    kind: str  # how it is written: see writer.py
    name: str  # relative to the directory of the checkpoint
    text: bytes  # its content, pickled, with numbers in place of tensors
    table: bytes  # pickled: a `Place` for each storage, and (storage, dtype, offset, shape, stride) of each tensor
    metadata: dict[str, str] | None = None


@dataclass
class CheckedTensor:
    """A parameter in shared memory that must be finite, or the checkpoint is not written."""

    name: str
    storage: Place
    described: tuple[Any, ...]  # dtype, offset, shape, stride


@dataclass
class Job:
    """A checkpoint to write, once `files` are in shared memory."""

    staging: str  # directory that exists, with the files in it that were written at once
    final: str  # the name it is to get
    step: int
    world_size: int
    position: dict[str, Any]
    files: list[FileSnapshot] = field(default_factory=list)
    checked: list[CheckedTensor] = field(default_factory=list)
    frozen: dict[str, dict[str, Any]] = field(default_factory=dict)  # as for `manifest.write_manifest`
    rank: int | None = None  # of the process whose part of a checkpoint this is; None: it commits
    others: list[str] = field(default_factory=list)  # files that other processes write there, which it waits for


class Snapshot:
    """The files of one checkpoint, each copied as it is when it is added. A `sink.Snapshot`.

    `to_check`: parameters that the writer looks at before it writes; those that were in no file are left in it.
    `layouts`: by file, those of the save before in the same arena; brought up to date. `num_processes`: of this
    machine, that take a snapshot now.
    """

    def __init__(
        self,
        arena: Arena,
        job: Job,
        to_check: dict[str, torch.Tensor] | None = None,
        layouts: dict[str, SnapshotLayout] | None = None,
        num_processes: int = 1,
    ) -> None:
        self.arena, self.job, self.to_check = arena, job, dict(to_check or {})
        self.num_bytes = 0  # of tensors
        self._layouts = {} if layouts is None else layouts
        self._num_processes = num_processes
        self._copies: list[Copy] = []  # still to be made
        self._sources: list[torch.Tensor] = []  # that these read
        # On an accelerator: what must be kept until the host has it, and the event that says so.
        self._held: list[torch.Tensor] = []
        self._copied: Any = None

    def add(
        self, kind: str, path: str | os.PathLike[str], content: Any, metadata: dict[str, str] | None = None
    ) -> bool:
        """Copy `content`, of which tensors in the host's memory must not change before `finish`, which copies them.

        False where it holds what another process may not know, or `path` is elsewhere.
        """
        name = os.path.relpath(path, self.job.staging)
        if name.startswith(os.pardir):
            return False
        if kind == "log":
            content = self._log_in_arena(content)
        finder = _Finder(_KNOWN_OBJECTS if kind == "object" else _KNOWN)
        try:
            text = finder.text(content)
            described = [described_as(tensor) for tensor in finder.tensors]
        except NotPlain as reason:
            logger.info("%s is written before training continues: %s.", name, reason)
            return False
        table = self._copy(name, finder.tensors, described) if described else b""
        self.job.files.append(FileSnapshot(kind, name.replace(os.sep, "/"), text, table, metadata))
        return True

    def _log_in_arena(self, text: StateText) -> tuple[bytes, bytes | tuple[int, ...], bytes]:
        """A long log is not copied into the arena at each save: it remains there, and grows."""
        is_short = len(text.log) < SMALL_BYTES
        log = bytes(text.log) if is_short else tuple(self.arena.put_text(text.log, text.version))
        return text.head, log, text.tail

    def finish(self) -> None:
        """Nothing more comes: make the copies, after which the run may continue."""
        copy_within_host(self._copies, self._num_processes)
        self._copies, self._sources = [], []

    def pass_over(self, tensors: list[torch.Tensor]) -> None:
        """`tensors` are in an earlier checkpoint, so they are finite."""
        storages = {_key(tensor.untyped_storage()) for tensor in tensors}
        self.to_check = {n: one for n, one in self.to_check.items() if _key(one.untyped_storage()) not in storages}

    def is_copied(self, wait: bool) -> bool:
        """Whether everything has reached the host. `wait`: until it has."""
        if self._copied is not None:
            if wait:
                self._copied.synchronize()
            elif not self._copied.query():
                return False
        self._copied, self._held = None, []
        return True

    def _copy(self, name: str, tensors: list[torch.Tensor], described: list[Description]) -> bytes:
        """Copy the storages of `tensors` into the arena; the table by which they are found there."""
        layout = self._layouts.get(name)
        if layout is None or layout.described != described:
            layout = layout_of(self.arena, described)
        elif (whole := self.arena.reserve(layout.whole.num_bytes)) != layout.whole:
            layout = layout_of(self.arena, described, whole)
        self._layouts[name] = layout
        self.num_bytes += layout.num_bytes
        self._copies += layout.copies
        self._sources += tensors
        if layout.is_on_device:
            by_device: dict[torch.device, dict[StorageKey, tuple[Place, torch.Tensor]]] = {}
            for tensor, (*_, device, address, num_bytes) in zip(tensors, described):
                if device.type != "cpu" and num_bytes:
                    storage, key = tensor.untyped_storage(), (device, address, num_bytes)
                    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                    by_device.setdefault(device, {})[key] = layout.places[key], flat
            for device, copies in by_device.items():
                self._copy_from_device(device, list(copies.values()))
        self._find_checked(layout.places)
        return layout.table

    def _find_checked(self, places: dict[StorageKey, Place]) -> None:
        for name, tensor in list(self.to_check.items()):
            place = places.get(_key(tensor.untyped_storage()))
            if place is not None:
                described = (tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
                self.job.checked.append(CheckedTensor(name, place, described))
                del self.to_check[name]

    def _copy_from_device(self, device: torch.device, copies: list[tuple[Place, torch.Tensor]]) -> None:
        """Copy on the device, at its speed; from there to the host on a second stream, while training continues.

        Where the device has no room for the copy, the next step waits for the way to the host instead.
        """
        block = self.arena.blocks[copies[0][0].block]
        block.pin()
        current = torch.cuda.current_stream(device)
        first, last = copies[0][0], copies[-1][0]
        begin, end = first.offset, last.offset + last.num_bytes
        try:
            flat = torch.empty(end - begin, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            for place, source in copies:
                self.arena.view(place).copy_(source, non_blocking=True)
            done = current
        else:
            views = [flat[place.offset - begin : place.offset - begin + place.num_bytes] for place, _ in copies]
            torch._foreach_copy_(views, [source for _, source in copies])
            done = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            done.wait_stream(current)
            with torch.cuda.stream(done):
                block.bytes[begin:end].copy_(flat, non_blocking=True)
            self._held.append(flat)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if self._copied is not None:  # the file before; one event is for both
            done.wait_event(self._copied)
        event.record(done)
        self._copied = event


def nonfinite(arena: Arena, checked: list[CheckedTensor]) -> list[str]:
    """Names of those that hold NaN or infinity."""
    return nonfinite_tensors({one.name: _tensor_in(arena, one.storage, *one.described) for one in checked})


def read(arena: Arena, file: FileSnapshot) -> Any:
    """Put a file's content together again; its tensors, and a long log, share the arena's memory."""
    content = _Reader(arena, file).load()
    if file.kind != "log":
        return content
    head, log, tail = content
    return StateText(head, log if isinstance(log, bytes) else arena.memory(Place(*log)), tail)


def _key(storage: torch.UntypedStorage) -> StorageKey:
    return storage.device, storage.data_ptr(), storage.nbytes()


def _tensor_in(
    arena: Arena, place: Place, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype).set_(arena.blocks[place.block].storage(place), offset, shape, stride)


class _Finder(pickle.Pickler):
    """Pickles everything but tensors, which become numbers; `tensors` are those, in this order."""

    def __init__(self, known: frozenset[str]) -> None:
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, pickle.HIGHEST_PROTOCOL)
        self._known = known
        self.tensors: list[torch.Tensor] = []

    def text(self, content: Any) -> bytes:
        """`content`, pickled. NotPlain where another process could not read it."""
        try:
            self.dump(content)
        except NotPlain:
            raise
        except Exception as error:  # whatever an object does when it is pickled
            raise NotPlain(f"{type(error).__name__}: {error}") from error
        return self._buffer.getvalue()

    def reducer_override(self, item: Any) -> Any:
        """Called for each item that is no plain value of Python."""
        if type(item) is torch.Tensor:
            self.tensors.append(item)
            return _tensor, (len(self.tensors) - 1,)
        if item is _tensor or (item if isinstance(item, type) else type(item)) in _KNOWN_TO_TORCH:
            return NotImplemented
        named = item if hasattr(item, "__qualname__") else type(item)  # a class or function, or an instance
        if str(named.__module__).partition(".")[0] not in self._known:
            raise NotPlain(f"it holds {named.__module__}.{named.__qualname__}")
        return NotImplemented


class _Reader(pickle.Unpickler):
    """Undoes `Snapshot.add`."""

    def __init__(self, arena: Arena, file: FileSnapshot) -> None:
        super().__init__(io.BytesIO(file.text))
        places, self._table = pickle.loads(file.table) if file.table else ([], [])
        self._storages = [arena.blocks[place.block].storage(place) for place in places]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, "_tensor"):
            return self._tensor
        return super().find_class(module, name)

    def _tensor(self, number: int) -> torch.Tensor:
        storage, dtype, *where = self._table[number]
        return torch.empty(0, dtype=dtype).set_(self._storages[storage], *where)


def _tensor(number: int) -> torch.Tensor:
    """In a pickle, the place of a tensor; `_Reader` knows where its bytes are."""
    raise TypeError("a snapshot is read with snapshot.read")
