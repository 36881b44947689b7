"""The moment a directory gets, changes or loses its name, so that a dead process or a power cut leaves no half one.

Owns: flushing to disk, publishing what was staged, deleting. Leaves to others: what it holds (save.py), which one
may go (layout.py). Where directories cannot be renamed (object stores, some mounts), a mark says that one is not whole.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress

from trainwright.checkpoint.paths import INCOMPLETE_NAME, is_ours, relative_files
from trainwright.safe_write import NO_RENAME, create_text

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]


def sibling(path: Path, purpose: str, pid: int | None = None) -> str:
    """A hidden name next to `path` that belongs to process `pid` (None: this one); `purpose` is staged, replaced or
    deleted.
    """
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(parent, f".{name}.{purpose}-{os.getpid() if pid is None else pid}")


def publish(staging: str, final: str) -> None:
    """Give `staging`, whose files are on disk, its name, and have the disk confirm it.

    A checkpoint of that name is deleted after; what no Trainer wrote is moved aside. Raises FileExistsError where it
    cannot be.
    """
    with suppress(OSError):
        os.rmdir(final)  # what is left of a deletion without rename; nothing happens unless it is empty
    if os.path.lexists(final) and not is_ours(final):
        _move_aside(final)
    replaced = sibling(final, "replaced")
    existed = os.path.lexists(final)
    try:
        if existed:
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(
                final, replaced
            )  # clean_up_staging repairs what is left by a run that dies between these two lines
        os.rename(staging, final)
    except OSError as error:
        if existed and not os.path.lexists(final):
            os.rename(replaced, final)
        if error.errno not in NO_RENAME:
            raise
        _copy_into_place(staging, final)
    flush_parents(final)
    if os.path.lexists(replaced):
        remove(replaced)


def remove(path: Path, deleter: Callable[[str], None] | None = None) -> None:
    """Delete a directory. It loses its name first, so that a run killed halfway leaves no half checkpoint.

    `deleter`: deletes what has lost its name, now or later; None: now.
    """
    doomed = sibling(path, "deleted")
    try:
        os.rename(path, doomed)
    except OSError:  # no rename here, or a left-over in the way
        doomed = os.fspath(path)
        with suppress(OSError):
            _empty_under_mark(doomed)
        deleter = None
    (deleter or delete)(doomed)


def delete(doomed: str) -> None:
    """Delete a directory that has lost the name of a checkpoint. Some 15 ms for 50 MB (ext4)."""
    shutil.rmtree(doomed, ignore_errors=True)
    if os.path.lexists(doomed):
        logger.warning("%s could not be deleted completely; it still takes space on the disk.", doomed)


def flush(path: str) -> None:
    """Have the disk confirm a file. Windows flushes only what is open for writing."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_directory(path: str) -> None:
    """Have the disk confirm the names in a directory, where the system can (Windows and some network mounts cannot)."""
    try:
        flush(path)
    except OSError as error:
        if os.name != "nt" and error.errno not in (errno.EINVAL, *NO_RENAME):
            raise


def flush_tree(directory: str) -> None:
    """Have the disk confirm everything under a directory, and its name last."""
    for name in relative_files(directory):
        flush(os.path.join(directory, name))
    for folder, _, _ in os.walk(directory, topdown=False):
        flush_directory(folder)


def flush_parents(path: str) -> None:
    """Have the disk confirm the name of `path`, and those of the two directories around it: a run has just made them.

    Those above belong to someone else, who may not let us.
    """
    folder = os.path.dirname(path)
    flush_directory(folder)
    for _ in range(2):
        folder = os.path.dirname(folder)
        try:
            flush_directory(folder)
        except OSError:
            return


def _copy_into_place(staging: str, final: str) -> None:
    flush_directory(os.path.dirname(final))  # from here on `staging` may be all there is of this checkpoint
    os.makedirs(final, exist_ok=True)
    _empty_under_mark(final)
    shutil.copytree(staging, final, dirs_exist_ok=True)
    flush_tree(final)
    os.remove(os.path.join(final, INCOMPLETE_NAME))
    flush_directory(final)
    flush_directory(os.path.dirname(final))
    shutil.rmtree(staging, ignore_errors=True)


def _empty_under_mark(directory: str) -> None:
    """Say on disk that `directory` is not, or no longer, complete, and delete all else in it."""
    path = os.path.join(directory, INCOMPLETE_NAME)
    if not os.path.isfile(path) or os.path.islink(path):
        create_text(path, "This checkpoint is not complete: a copy or a deletion is not finished.\n")
    flush(path)
    flush_directory(directory)
    for name in os.listdir(directory):
        entry = os.path.join(directory, name)
        if os.path.isdir(entry) and not os.path.islink(entry):
            shutil.rmtree(entry)
        elif name != INCOMPLETE_NAME:
            os.remove(entry)


def _move_aside(path: str) -> None:
    number = 1
    while os.path.lexists(target := f"{path}.not-ours-{number}"):
        number += 1
    try:
        os.rename(path, target)
    except OSError as error:
        raise FileExistsError(
            f"{path} is in the way of a checkpoint and was not written by a Trainer: move it away."
        ) from error
    logger.warning("%s was in the way of a checkpoint, and no Trainer wrote it. It is now %s.", path, target)
