"""What runs that died while saving left in a directory: finished, put back or deleted.

Owns: `clean_up_staging`, and telling whether the process that made a directory still runs. Leaves to others: the names
of what is left (commit.py), whether a checkpoint is whole (manifest.py).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time

from trainwright.checkpoint.commit import flush_tree, publish
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.paths import INCOMPLETE_NAME, step_of
from trainwright.names import CHECKPOINT_PREFIX, MANIFEST_NAME

logger = logging.getLogger(__name__)

_ENDING = 4  # PF_EXITING among the flags that Linux shows of a process
MOST_WAIT_S = 600  # for a checkpoint that the writer of a dead run has still to finish

# What a hidden sibling of a checkpoint is for, and the process that made it. "model": where a model is saved into the
# same directory. What is deleted may itself be one that was replaced. Any other name is not ours, and may be "..".
_SIBLING = re.compile(
    rf"\.(?P<name>{CHECKPOINT_PREFIX}-[0-9]+|\.{CHECKPOINT_PREFIX}-[0-9]+\.(?:staged|replaced)-[0-9]+|model)"
    r"\.(?P<purpose>staged|replaced|deleted)-(?P<pid>[0-9]{1,19})"
)
_MOST_PID = (1 << 31) - 1  # a larger number is no process, and the system refuses to be asked

Path = str | os.PathLike[str]


def clean_up_staging(output_dir: Path) -> None:
    """Clear up what runs that died while saving left in `output_dir`; call it in one process, before training.

    A staged checkpoint that is complete gets its name, one that was moved aside for it comes back if need be, the rest
    is deleted. What a process that still runs has made is left alone.
    """
    _wait_for_writers(output_dir)
    siblings = []
    for entry in os.scandir(output_dir):
        match = _SIBLING.fullmatch(entry.name)
        if match and entry.is_dir(follow_symlinks=False) and not _is_running(int(match["pid"]), entry.path):
            siblings.append((match["purpose"], entry.path, os.path.join(output_dir, match["name"])))
        elif step_of(entry.name) is None or not entry.is_dir(follow_symlinks=False):
            continue
        elif os.path.isfile(os.path.join(entry.path, INCOMPLETE_NAME)):
            siblings.append(("deleted", entry.path, entry.path))  # where rename is missing: copied or deleted halfway
    order = {"staged": 0, "replaced": 1, "deleted": 2}  # the new one first, then the one it was to replace
    for purpose, path, final in sorted(siblings, key=lambda sibling: order[sibling[0]]):
        if purpose == "deleted" and path == final and not os.path.lexists(os.path.join(path, INCOMPLETE_NAME)):
            continue  # what was staged for it has just replaced it
        is_checkpoint = step_of(final) is not None
        if purpose == "staged" and is_checkpoint and _is_whole(path) and not _is_whole(final):
            logger.warning("%s is complete, its run died before naming it. It is now %s.", path, final)
            flush_tree(path)
            publish(path, final)
        elif purpose == "replaced" and is_checkpoint and not os.path.lexists(final):
            publish(path, final)
        else:
            logger.info("Deleting %s, left by a run that died while saving.", path)
            shutil.rmtree(path, ignore_errors=True)


def _wait_for_writers(output_dir: Path) -> None:
    """Let the writers of runs that died (`async_save`) finish what they were sent: it is newer than all else here."""
    for entry in os.scandir(output_dir):
        match = _SIBLING.fullmatch(entry.name)
        if not match or match["purpose"] != "staged" or not _is_writer(pid := int(match["pid"])):
            continue
        logger.warning("%s is still being written (by process %d); waiting for it.", entry.path, pid)
        deadline = time.monotonic() + MOST_WAIT_S
        while os.path.lexists(entry.path) and _is_writer(pid):
            if time.monotonic() > deadline:
                logger.warning("%s is not done after %d s and left alone.", entry.path, MOST_WAIT_S)
                break
            time.sleep(0.02)


def _is_writer(pid: int) -> bool:
    """Whether a process that writes checkpoints for a run has this number. Only Linux says so."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"trainwright.checkpoint.writer" in file.read()
    except OSError:
        return False


def _status(pid: int) -> list[bytes] | None:
    """What /proc/PID/stat says of a process, from its state on; None where there is none, or the system is another."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return None


def _is_whole(path: str) -> bool:
    return os.path.lexists(os.path.join(path, MANIFEST_NAME)) and not problems(path)


def _is_running(pid: int, path: str) -> bool:
    """Whether another process that can have made `path` runs here as `pid`. This process's is a left-over: nothing is
    staged before training.
    """
    if pid == os.getpid() or not 0 < pid <= _MOST_PID:
        return False
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    fields = _status(pid)
    if fields and int(fields[6]) & _ENDING:  # also one that has ended, and was not waited for
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs for someone else
        pass
    # Numbers are reused, in containers soon: a process that is younger than the directory did not make it.
    started = _start_time_s(pid)
    return started is None or started <= os.stat(path).st_mtime + 2


def _start_time_s(pid: int) -> float | None:
    """When a process began, in seconds since 1970; None where the system does not say (only Linux does, in /proc)."""
    fields = _status(pid)
    if not fields:
        return None
    try:
        ticks = int(fields[19])
        with open("/proc/stat", "rb") as file:
            booted = next(int(line.split()[1]) for line in file if line.startswith(b"btime"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return booted + ticks / os.sysconf("SC_CLK_TCK")
