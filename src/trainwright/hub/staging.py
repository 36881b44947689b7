"""Which files go into a push, and a snapshot of them while it runs.

Owns: the choice of files for each `hub_strategy`, and snapshots made of hard links and copies. Leaves to others: the
upload. A push runs during training, so its files may be rotated away, replaced or changed meanwhile. A hard link costs
no copy and preserves a file that is never changed until the push is done.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence

from trainwright.checkpoint.layout import step_of
from trainwright.checkpoint.paths import relative_files
from trainwright.names import (
    CHECKPOINT_PREFIX,
    LOOP_STATE_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    OPTIMIZER_NAME,
    REPORT_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    HubStrategy,
)

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"  # the folder in the repository that holds the newest checkpoint
STAGING_PREFIX = ".hub-push-"

# Not part of the model as others load it: checkpoints, scratch files, snapshots, directories still being written.
IGNORED = (
    "_*",
    ".git/*",
    f"{CHECKPOINT_PREFIX}-*",
    f".{CHECKPOINT_PREFIX}-*",
    f"{STAGING_PREFIX}*",
    "*.tmp",
    "*.tmp/*",
    "tracker_runs/*",
    METRICS_NAME,
    REPORT_NAME,
)
# Outside checkpoints: what a save replaces and never changes, so that a hard link preserves it. Others may be appended
# to or rewritten while they are uploaded (event files of a tracker), so they are copied.
_NEVER_CHANGED = ("*.safetensors", "*.bin")

# What a checkpoint holds for resuming only; the rest of it is the model, its config and its processing files.
_FOR_RESUMING = (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    SCALER_NAME,
    TRAINER_STATE_NAME,
    MANIFEST_NAME,
    LOOP_STATE_NAME,
    "rng_state*.pth",
    "optimizer.bin",
    "optimizer_[0-9]*",
    "pytorch_model_fsdp*",
    "global_step*",  # DeepSpeed
    "latest",
    "zero_to_fp32.py",
    "_*",
    ".*",
)


def files_in(folder: str, ignore_patterns: Sequence[str] = (), within: str | None = None) -> list[str]:
    """Paths of the files in `folder`, relative to it, with "/" between parts, sorted.

    A pattern is matched against the whole relative path and `*` matches "/" too, as on the Hub. Files outside `within`
    (None: `folder`), the directory that is pushed, are left out, with a warning.
    """
    # Another user may have prepared a run's folder: a push would publish the target of a link to a private file, and
    # opening a named pipe blocks. `stage` looks again at what it opens.
    root = os.path.join(os.path.realpath(within or folder), "")
    files: list[str] = []
    foreign: dict[str, str] = {}
    for name in relative_files(folder):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore_patterns):
            continue
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        if not real.startswith(root):
            foreign[name] = f"a link that leaves {within or folder}"
        elif os.path.lexists(path) and not os.path.isfile(real):  # a missing file fails where it is opened
            foreign[name] = "no plain file"
        else:
            files.append(name)
    if foreign:
        names = ", ".join(f"{name!r} ({what})" for name, what in foreign.items())
        logger.warning("Left out of the push from %s: %s.", folder, names)
    return files


def modeling_files_to_copy(checkpoint_dir: str) -> list[str]:
    """Files of a checkpoint that make up the model: weights, config, processing files, `training_args.bin`."""
    return files_in(checkpoint_dir, _FOR_RESUMING, within=os.path.dirname(os.path.abspath(checkpoint_dir)))


def checkpoint_files(
    output_dir: str,
    checkpoint_dir: str | None,
    strategy: HubStrategy | str,
    pushed: Iterable[str] = (),
    *,
    model_is_in_output_dir: bool = False,
) -> dict[str, str]:
    """The files of a push after a save: path in the repository -> file.

    Every strategy pushes the files in `output_dir` and the model of `checkpoint_dir`, unless that in `output_dir` is
    the one to push. "checkpoint" adds the checkpoint as `last-checkpoint/`, "all_checkpoints" adds each one in
    `output_dir` that is not named in `pushed`. `checkpoint_dir`: None where there is none.
    """
    strategy = HubStrategy(strategy)
    files = {path: os.path.join(output_dir, path) for path in files_in(output_dir, IGNORED)}
    if checkpoint_dir is not None and not model_is_in_output_dir:
        files |= {path: os.path.join(checkpoint_dir, path) for path in modeling_files_to_copy(checkpoint_dir)}
    folders = {}
    if strategy is HubStrategy.CHECKPOINT and checkpoint_dir is not None:
        folders[LAST_CHECKPOINT] = checkpoint_dir
    elif strategy is HubStrategy.ALL_CHECKPOINTS:
        folders = {name: os.path.join(output_dir, name) for name in checkpoints_in(output_dir) if name not in pushed}
    for name, folder in folders.items():
        files |= {f"{name}/{path}": os.path.join(folder, path) for path in files_in(folder, within=output_dir)}
    return files


def checkpoints_in(output_dir: str) -> list[str]:
    """Names of the `checkpoint-<step>` directories in `output_dir`."""
    return sorted(entry.name for entry in os.scandir(output_dir) if entry.is_dir() and step_of(entry.name) is not None)


def stage(files: Mapping[str, str], directory: str) -> str:
    """A snapshot of `files` (path in the repository -> file) in a new hidden directory in `directory`; its path.

    Files of checkpoints, and weights, are hard links where the file system has them; others are copies. Raises OSError
    where a file is outside `directory` by now, or no plain file: it may have been replaced since it was chosen.
    """
    root = tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=directory)
    try:
        for path, source in files.items():
            target = os.path.join(root, *path.split("/"))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            _put(source, target, directory)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    return root


def _put(source: str, target: str, directory: str) -> None:
    real, base = os.path.realpath(source), os.path.realpath(directory)
    parts = os.path.relpath(real, base).split(os.sep)
    if parts[0] == os.pardir or os.path.isabs(parts[0]):
        raise OSError(errno.EXDEV, f"{source} leads out of {directory}, so it is not pushed")
    is_fixed = any(step_of(part) is not None for part in parts[:-1]) or any(
        fnmatch.fnmatchcase(parts[-1], pattern) for pattern in _NEVER_CHANGED
    )
    with _opened(base, parts) as (file, folder):
        if not (is_fixed and _linked(parts[-1], folder, file, target, real)):
            with open(file, "rb", closefd=False) as content, open(target, "xb") as copy:
                shutil.copyfileobj(content, copy)


@contextlib.contextmanager
def _opened(base: str, parts: Sequence[str]) -> Iterator[tuple[int, int | None]]:
    """(the open file, its open folder) of the path `parts` in `base`, without following a link on the way; the folder
    is None where the system opens no file relative to another.
    """
    path = os.path.join(base, *parts)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with contextlib.ExitStack() as opened:
        folder: int | None = None
        if os.open in os.supports_dir_fd:
            folder = _closing(opened, os.open(base, os.O_RDONLY | os.O_DIRECTORY))
            for part in parts[:-1]:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                folder = _closing(opened, inner)
            file = _closing(opened, os.open(parts[-1], flags, dir_fd=folder))
        else:
            file = _closing(opened, os.open(path, flags))
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, f"{path} is no plain file, so it is not pushed")
        yield file, folder


def _closing(opened: contextlib.ExitStack, descriptor: int) -> int:
    opened.callback(os.close, descriptor)
    return descriptor


def _linked(name: str, folder: int | None, file: int, target: str, real: str) -> bool:
    """Whether `target` is now a hard link to the open `file`, called `name` in the open `folder`."""
    try:
        if folder is None:
            os.link(real, target)
        else:
            os.link(name, target, src_dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        return False
    if os.path.samestat(os.lstat(target), os.fstat(file)):
        return True
    os.unlink(target)
    raise OSError(errno.EAGAIN, f"{real} was replaced while it was linked, so it is not pushed")


def remove_stale_stages(output_dir: str) -> None:
    """Remove the stages of a killed process: their links keep rotated checkpoints on disk."""
    for entry in os.scandir(output_dir):
        if entry.is_dir(follow_symlinks=False) and entry.name.startswith(STAGING_PREFIX):
            shutil.rmtree(entry.path, ignore_errors=True)
