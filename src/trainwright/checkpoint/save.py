"""Write a checkpoint so that it is there completely or not at all.

Owns: staging, and the files that hold more than weights (those: weights.py). Leaves to others: the moment a checkpoint
gets its name (commit.py), when to save, and which process does.
Order: write into a hidden sibling, flush each file, manifest last, flush the directory, rename, flush the parent.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from trainwright.checkpoint import sink
from trainwright.checkpoint.commit import flush, flush_directory, flush_parents, flush_tree, publish, sibling
from trainwright.checkpoint.manifest import write_manifest
from trainwright.checkpoint.paths import MODEL_NAMES, relative_files, rng_name
from trainwright.checkpoint.tensors import NUMPY_GLOBALS
from trainwright.names import (
    LOOP_STATE_NAME,
    MANIFEST_NAME,
    OPTIMIZER_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from trainwright.redact import forget_secrets
from trainwright.safe_write import check_place, folder_inside, give_mode, mode_of_new_files, put
from trainwright.seeding import ACCELERATORS, RngState

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments
    from trainwright.checkpoint.frozen import FrozenWeights
    from trainwright.state import TrainerState

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]

# Backends whose generators are part of a run's state, each under its own key. One that was never used is left out.


@contextmanager
def staged(
    final_directory: Path,
    *,
    step: int,
    world_size: int,
    position: dict[str, Any],
    frozen: FrozenWeights | None = None,
    folders: Iterable[str] = (),
) -> Iterator[str]:
    """Yield a hidden directory to write into; it becomes `final_directory` when the block ends without an exception.

    After an exception it is deleted and `final_directory` is as it was. One process enters; others that write files too
    must get the path, and must be done before this one leaves. `position` is where in the data the run is, in
    samples, and must be JSON. A complete `final_directory` of before is deleted only once the new one has its name.
    `frozen`: what the run knows of weights that need not be written again. `folders`: to make in it, before others
    write there.
    """
    final = os.path.abspath(final_directory)
    staging = sibling(final, "staged")
    os.makedirs(os.path.dirname(final), exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)  # ours, from a save that failed halfway
    os.mkdir(staging)
    try:
        for folder in folders:
            os.makedirs(os.path.join(staging, folder))
        files = frozen.files_of(staging, final) if frozen is not None else None
        if frozen is None or files is None:
            yield staging
        else:
            with sink.opened(staging, sink.Sink(frozen=files)):
                yield staging
            frozen.note(final, files)
        entries = files.entries if files is not None else None
        commit(staging, final, step=step, world_size=world_size, position=position, frozen=entries)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def commit(
    staging: str,
    final: str,
    *,
    step: int,
    world_size: int,
    position: dict[str, Any],
    frozen: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Have the disk confirm what is in `staging`, promise it in a manifest, and give it the name `final`.

    `frozen`: as for `write_manifest`.
    """
    manifest = write_manifest(staging, step, world_size, position, frozen, flush)
    path = os.path.join(staging, MANIFEST_NAME)
    _share_weights(staging, manifest.files, stat.S_IMODE(os.stat(path).st_mode))
    flush(path)
    for folder, _, _ in os.walk(staging, topdown=False):
        flush_directory(folder)
    publish(staging, final)


@contextmanager
def replacing(directory: Path) -> Iterator[str]:
    """Yield a hidden directory to write into; when the block ends, each of its files replaces the one of its name.

    For a model saved next to checkpoints: a process that dies leaves each file as it was or as it shall be. After an
    exception `directory` is as it was. Weights of another name, which a loader would read as the new ones, go last.
    """
    directory = os.path.abspath(directory)
    staging = sibling(os.path.join(directory, "model"), "staged")
    os.makedirs(directory, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    os.mkdir(staging)
    try:
        yield staging
        names = relative_files(staging)
        _share_weights(staging, names, mode_of_new_files(staging))
        flush_tree(staging)
        written = sorted(names, key=lambda name: name.endswith(".index.json"))  # after its shards
        for name in written:  # all before the first is replaced
            check_place(os.path.join(folder_inside(directory, *name.split("/")[:-1]), name.rpartition("/")[2]))
        for name in written:
            if put(os.path.join(staging, name), os.path.join(directory, name)):
                flush(os.path.join(directory, name))
        if MODEL_NAMES.intersection(written):
            for name in MODEL_NAMES.difference(written):
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(directory, name))
        for folder in {os.path.dirname(os.path.join(directory, name)) for name in written}:
            flush_directory(folder)
        flush_parents(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _share_weights(directory: str, names: Iterable[str], mode: int) -> None:
    """Of files `names`, give weights the permissions of every other new file: safetensors makes them readable for
    their owner only.
    """
    for name in names:
        if name.endswith(".safetensors"):
            give_mode(os.path.join(directory, name), mode)


class HasState(Protocol):
    """An optimizer, a schedule or a loss scale, of torch or of another library."""

    def state_dict(self) -> dict[str, Any]: ...


def save_optimizer(directory: Path, optimizer: HasState, state: dict[str, Any] | None = None) -> None:
    """Write the optimizer's state to `optimizer.pt`; `state`: where it was gathered from several processes."""
    _save_state(os.path.join(directory, OPTIMIZER_NAME), optimizer.state_dict() if state is None else state)


def save_scheduler(directory: Path, scheduler: HasState) -> None:
    """Write the learning-rate schedule's state to `scheduler.pt`."""
    _save_state(os.path.join(directory, SCHEDULER_NAME), scheduler.state_dict())


def save_scaler(directory: Path, scaler: HasState) -> None:
    """Write the fp16 loss scale to `scaler.pt`."""
    _save_state(os.path.join(directory, SCALER_NAME), scaler.state_dict())


def save_rng(directory: Path, *, rank: int = 0, world_size: int = 1) -> None:
    """Write this process's random state: Python, NumPy, torch, accelerators.

    A single process writes `rng_state.pth`, with the state of every device; one of several writes
    `rng_state_<rank>.pth`, with that of its device.
    """
    state = RngState.capture(ACCELERATORS, every_device=world_size <= 1).state_dict()
    path = os.path.join(directory, rng_name(rank, world_size))
    sink.write("torch", path, state)


def save_training_args(directory: Path, args: TrainingArguments) -> None:
    """Write the arguments to `training_args.bin` for other tools; trainwright never reads it. Secrets are left out."""
    path, encoded = os.path.join(directory, TRAINING_ARGS_NAME), _encoded(args)
    if encoded.clean is None:
        encoded.clean = copy.copy(args)
        forget_secrets(vars(encoded.clean))
    if encoded.file is not None and sink.of(path).snapshot is None:
        with open(path, "wb") as file:
            file.write(encoded.file)
        return
    try:
        if sink.write("object", path, encoded.clean) and encoded.key is not None:
            with open(path, "rb") as file:
                encoded.file = file.read()
    except (TypeError, AttributeError, ValueError, pickle.PicklingError) as error:
        # Nothing here is needed to resume, so it must not cost the checkpoint.
        logger.warning("%s was not written: the arguments hold something that cannot be pickled (%s).", path, error)
        os.remove(path)


def arguments_as_json(args: TrainingArguments) -> dict[str, Any]:
    """`args.to_dict()`, made once while they do not change; not to be changed."""
    encoded = _encoded(args)
    if encoded.json is None:
        encoded.json = args.to_dict()
    return encoded.json


@dataclass
class _EncodedArguments:
    """What checkpoints hold of arguments, each part made when it is first needed."""

    key: bytes | None  # that differs where the arguments do; None: of some that cannot be compared
    json: dict[str, Any] | None = None
    clean: TrainingArguments | None = None  # a copy without secrets
    file: bytes | None = None  # `training_args.bin`


_latest = _EncodedArguments(None)


def _encoded(args: TrainingArguments) -> _EncodedArguments:
    """Those of the save before, where these arguments are the same: some 150 fields, several hundred calls."""
    global _latest
    try:
        key = pickle.dumps((type(args), vars(args)))
    except Exception:  # whatever an object does when it is pickled
        return _EncodedArguments(None)
    if key != _latest.key:
        _latest = _EncodedArguments(key)
    return _latest


def save_loop_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write what only trainwright reads (loss window, position, callbacks) to `loop_state.json`; it must be JSON."""
    sink.write("json", os.path.join(directory, LOOP_STATE_NAME), state)


def save_trainer_state(directory: Path, state: TrainerState) -> None:
    """Write a `TrainerState` to `trainer_state.json`."""
    path = os.path.join(directory, TRAINER_STATE_NAME)
    if state.overrides_json():
        state.save_to_json(path)
        return
    sink.write("log", path, state.text_parts(thoroughly=state.global_step >= state.max_steps))


def _save_state(path: str, state: Any) -> None:
    """Write `state`, and say now, not at the resume, if it holds something that will not be read back."""
    is_written = sink.write("torch", path, state)  # as it always is if it holds such things
    if not is_written:
        return
    with torch.serialization.safe_globals(NUMPY_GLOBALS):  # as `load_tensors` reads it
        objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if objects:
        logger.warning(
            "%s holds objects that are not loaded from files: %s. To resume from it, first call "
            "torch.serialization.add_safe_globals([...]) with them.",
            path,
            ", ".join(objects),
        )
