"""Two runs that train into one directory at once, which would delete each other's checkpoints: found and named.

Owns: `output_dir_lock`. Leaves to others: the directory itself. The lock is the kernel's, on the open directory: no
file is written, and it ends with the process that holds it, however that dies, so that it never blocks a job that is
started again. That is also why it only warns. It is seen by processes of the same machine only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from trainwright.forks import hold_alone

logger = logging.getLogger(__name__)


class _OpenDirectory:
    """A directory that is open in this process, and in none that it forks. The lock is that of the open directory: a
    worker of a loader that outlives the run would hold it, and a fork that leaves the run would end it.
    """

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        hold_alone(self)

    def let_go(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def unlock(self) -> None:
        import fcntl

        with suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # a fork that Python did not make may share the descriptor
        self.let_go()


@contextmanager
def output_dir_lock(directory: str, *, is_wanted: bool = True) -> Iterator[None]:
    """While the body runs, other runs that enter `directory` warn of this one; warns where another one is inside."""
    if not is_wanted:
        yield
        return
    try:
        import fcntl

        opened = _OpenDirectory(directory)
    except (ImportError, OSError):  # Windows; nothing there to be locked
        yield
        return
    try:
        try:
            fcntl.flock(opened.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning(
                "ANOTHER RUN (%s on this machine) IS TRAINING INTO %s. Both would overwrite and delete each other's "
                "checkpoints: give each its own output_dir. Where it is one that you have just stopped, it is about to "
                "end, and nothing needs to be done.",
                _holder(opened.descriptor),
                directory,
            )
        except OSError:  # a mount without locks
            pass
        yield
    finally:
        if opened.descriptor >= 0:  # else this is a fork, which leaves the lock to its run
            opened.unlock()


def _holder(descriptor: int) -> str:
    """The process that holds the lock, as far as the system says (only Linux does)."""
    file = os.fstat(descriptor)
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    with suppress(OSError, ValueError, IndexError), open("/proc/locks") as locks:
        for line in locks:
            fields = line.split()
            if fields[1] == "FLOCK" and place in fields and int(fields[4]) > 0:
                return f"process {fields[4]}"
    return "a process"
