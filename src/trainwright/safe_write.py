"""Safe writes where others may have prepared the path: a link, a named pipe, a file that is not ours.

Owns: exclusive creation of a temporary file that then replaces the path, folders inside a run's directory, and reading
a file before it is rewritten. Leaves to others: the content, fsync, and files in a directory that this process has just
made, where no one else can have prepared anything. Imports nothing outside the standard library.

A link is replaced by the file: its target is neither written nor changed. The mode of a file follows the umask,
whichever library writes it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]

# Errors of file systems that cannot rename (a directory): bind mounts and overlays, object stores (ENOSYS, EPERM, and
# EMFILE where they would have to move too many objects).
NO_RENAME = frozenset((errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EMFILE))

_EXCLUSIVELY = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8; what cannot be encoded (half of a surrogate pair) is written as its escape, `\\ud800`.

    Errors as `fresh`.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content`. Errors as `fresh`."""
    with fresh(path) as staged, open(staged, "wb") as file:
        file.write(content)


@contextmanager
def fresh(path: Path) -> Iterator[str]:
    """Yield the path of a new, empty file next to `path` to write into; it replaces `path` atomically after the block.

    After an exception it is removed, and `path` is unchanged. Raises FileExistsError where `path` is neither a file nor
    a link: opening a named pipe would block.
    """
    check_place(path)
    folder, name = os.path.split(os.fspath(path))
    # Hidden, with a name that no one can have prepared, and that pushes ignore (hub/staging.py).
    staged = os.path.join(folder, f".{name}.{os.urandom(8).hex()}.tmp")
    descriptor = os.open(staged, _EXCLUSIVELY, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield staged
        give_mode(staged, mode)
        put(staged, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(staged)
        raise


def check_place(path: Path) -> None:
    """Raise FileExistsError, naming what is there, where `path` is something that a file cannot replace."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise FileExistsError(
                errno.EEXIST, f"{os.fspath(path)} is {kind}, in the place of a file that is to be written. Move it away"
            )


def create_text(path: Path, text: str) -> None:
    """Write `text` to `path`, created exclusively and without a temporary name; a link there is removed.

    For a marker in a directory where any other name would count. Errors as `fresh`.
    """
    check_place(path)
    with suppress(FileNotFoundError):
        os.unlink(path)
    with open(os.open(path, _EXCLUSIVELY, 0o666), "w", encoding="utf-8") as file:
        file.write(text)


def put(staged: str, path: Path) -> bool:
    """Replace `path`, which may be a link, by the file `staged`.

    True where the file system cannot rename, so that it was copied and is not fsynced.
    """
    if os.path.islink(path):
        logger.warning(
            "%s was a link to %s. It is now a file; its target was not changed.", os.fspath(path), _target(path)
        )
    try:
        os.replace(staged, path)
        return False
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
    with suppress(FileNotFoundError):
        os.unlink(path)
    mode = stat.S_IMODE(os.stat(staged).st_mode)
    with open(staged, "rb") as source, open(os.open(path, _EXCLUSIVELY, mode), "wb") as target:
        shutil.copyfileobj(source, target)
    os.unlink(staged)
    return True


def mode_of_new_files(directory: Path) -> int:
    """The permissions of a new file in `directory`; found by creating one, since reading the umask changes it for every
    thread.
    """
    path = os.path.join(directory, f".{os.urandom(8).hex()}.tmp")
    descriptor = os.open(path, _EXCLUSIVELY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        os.unlink(path)


def give_mode(path: Path, mode: int) -> None:
    """Give `path` the permissions `mode` where the library that wrote it gave it others (safetensors 0.8: 0600)."""
    if stat.S_IMODE(os.stat(path).st_mode) != mode:
        with suppress(PermissionError):
            os.chmod(path, mode)


def folder_inside(directory: Path, *names: str) -> str:
    """Make the nested folder `names` in `directory`; returns its path. Raises FileExistsError where one of them is a
    link, which may lead out of `directory`, or no folder; `directory` itself may be a link.
    """
    path = os.fspath(directory)
    os.makedirs(path, exist_ok=True)
    for name in names:
        path = os.path.join(path, name)
        with suppress(FileExistsError):
            os.mkdir(path)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            what = f"a link to {_target(path)}" if os.path.islink(path) else "no directory"
            raise FileExistsError(
                errno.EEXIST, f"{path} is {what}, in the place of a folder that is to be written. Move it away"
            )
    return path


def earlier_bytes(path: Path) -> bytes:
    """The content of `path` before it is rewritten; empty where nothing, or only a link, is there.

    The target of a link is not read: it would be copied into a file of the run, which may then be pushed. Errors as
    `fresh`.
    """
    check_place(path)
    if os.path.islink(path) or not os.path.exists(path):
        return b""
    with open(path, "rb") as file:
        return file.read()


def _target(path: Path) -> str:
    return repr(os.readlink(path))
