"""Which files go into a push, and a snapshot of them while it runs.

Owns: the choice of files for each `hub_strategy`, and snapshots made of hard links. Leaves to others: the upload.
A push runs during training, so its files may be rotated away or replaced meanwhile. A hard link costs no copy and
preserves the file until the push is done.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence

from trainwright.checkpoint.layout import step_of
from trainwright.checkpoint.paths import relative_files
from trainwright.names import (
    CHECKPOINT_PREFIX,
    LOOP_STATE_NAME,
    MANIFEST_NAME,
    OPTIMIZER_NAME,
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
)

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
    files, foreign = files_and_foreign(folder, ignore_patterns, within)
    if foreign:
        names = ", ".join(f"{name!r} ({what})" for name, what in foreign.items())
        logger.warning("Left out of the push from %s: %s.", folder, names)
    return files


def files_and_foreign(
    folder: str, ignore_patterns: Sequence[str] = (), within: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """(files, what is left out with what it is) as of `files_in`.

    Another user may have prepared a run's folder: a push would publish the target of a link to a private file, and
    opening a named pipe blocks.
    """
    root = os.path.join(os.path.realpath(within or folder), "")
    files, foreign = [], {}
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
    return files, foreign


def modeling_files_to_copy(checkpoint_dir: str) -> list[str]:
    """Files of a checkpoint that make up the model: weights, config, processing files, `training_args.bin`."""
    return files_in(checkpoint_dir, _FOR_RESUMING, within=os.path.dirname(os.path.abspath(checkpoint_dir)))


def checkpoint_files(
    output_dir: str, checkpoint_dir: str, strategy: HubStrategy | str, pushed: Iterable[str] = ()
) -> dict[str, str]:
    """The files of a push after a save: path in the repository -> file.

    Every strategy pushes the files in `output_dir` and the model of `checkpoint_dir`. "checkpoint" adds the checkpoint
    as `last-checkpoint/`, "all_checkpoints" adds each one in `output_dir` that is not named in `pushed`.
    """
    strategy = HubStrategy(strategy)
    files = {path: os.path.join(output_dir, path) for path in files_in(output_dir, IGNORED)}
    files |= {path: os.path.join(checkpoint_dir, path) for path in modeling_files_to_copy(checkpoint_dir)}
    folders = {}
    if strategy is HubStrategy.CHECKPOINT:
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
    """Hard-link `files` (path in the repository -> file) into a new hidden directory in `directory`; return its path.

    `directory` must be on the file system of the files; where links are impossible, the files are copied.
    """
    root = tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=directory)
    try:
        for path, source in files.items():
            target = os.path.join(root, *path.split("/"))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            source = os.path.realpath(source)  # a hard link to a symbolic link would not preserve the file
            try:
                os.link(source, target)
            except FileNotFoundError:
                raise
            except OSError:  # another file system, or one without links
                shutil.copy2(source, target)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    return root


def remove_stale_stages(output_dir: str) -> None:
    """Remove the stages of a killed process: their links keep rotated checkpoints on disk."""
    for entry in os.scandir(output_dir):
        if entry.is_dir(follow_symlinks=False) and entry.name.startswith(STAGING_PREFIX):
            shutil.rmtree(entry.path, ignore_errors=True)
