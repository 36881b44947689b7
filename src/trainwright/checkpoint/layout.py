"""Where checkpoints lie: their names, which is the last, and which may go.

Owns: `checkpoint-N` directories of one output directory. Leaves to others: what stands in them (manifest.py), how one
appears and goes (commit.py). A directory is ours if it holds a manifest or a trainer state; no other is ever deleted.
Source: seed 001 (`save_total_limit`, `load_best_model_at_end`).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable

from trainwright.checkpoint.commit import flush_tree, publish, remove
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.paths import INCOMPLETE_NAME, is_ours
from trainwright.checkpoint.paths import step_of as step_of  # where others look for it
from trainwright.checkpoint.runs import oldest_first
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


def checkpoint_name(step: int) -> str:
    """Directory of the checkpoint after `step` updates, for example `checkpoint-500`."""
    return f"{CHECKPOINT_PREFIX}-{step}"


def get_last_checkpoint(folder: Path) -> str | None:
    """The `checkpoint-N` directory with the highest N in `folder`, or None. Without `folder`: FileNotFoundError."""
    ordered = sort_checkpoints(folder)
    return ordered[-1] if ordered else None


def sort_checkpoints(
    output_dir: Path,
    checkpoint_prefix: str = CHECKPOINT_PREFIX,
    use_mtime: bool = False,
    best_model_checkpoint: str | None = None,
) -> list[str]:
    """The checkpoint directories of `output_dir`, oldest first, by step or by modification time.

    The best one is moved to the place before the last, so that whoever deletes from the front deletes it late. A link
    is not followed (`linked_checkpoints`): where it leads is not this directory's.
    """
    found = []
    for entry in os.scandir(output_dir):
        step = step_of(entry.name, checkpoint_prefix)
        if (
            step is not None
            and entry.is_dir(follow_symlinks=False)
            and not os.path.lexists(os.path.join(entry.path, INCOMPLETE_NAME))
        ):
            found.append((entry.stat().st_mtime_ns if use_mtime else step, step, entry.path))
    return _best_late([path for _, _, path in sorted(found)], best_model_checkpoint)


def linked_checkpoints(output_dir: Path) -> list[str]:
    """Paths in `output_dir` that are named as checkpoints and are links, by step."""
    found = [(step_of(entry.name), entry.path) for entry in os.scandir(output_dir) if entry.is_symlink()]
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def _best_late(ordered: list[str], best: str | None) -> list[str]:
    """`ordered`, with the best before the last."""
    found = next((path for path in ordered[:-1] if same_place(path, best)), None)
    if found is None:
        return ordered
    others = [path for path in ordered if path != found]
    return [*others[:-1], found, others[-1]]


def checkpoints_to_delete(
    output_dir: Path,
    limit: int | None,
    best: str | None = None,
    keep: Iterable[str] = (),
    *,
    use_mtime: bool = False,
    checkpoint_prefix: str = CHECKPOINT_PREFIX,
) -> list[str]:
    """Which checkpoints of ours go when at most `limit` may stay. Deletes nothing.

    Those of earlier runs go before those of the newest (runs.py), within a run the lowest step first. The newest and
    the best always stay, so a limit of 1 keeps two where they differ. Those in `keep` stay as well, beyond the limit.
    No limit, or one below 1, deletes nothing.
    """
    if limit is None or limit < 1:
        return []
    ordered = [p for p in sort_checkpoints(output_dir, checkpoint_prefix, use_mtime) if is_ours(p)]
    ordered = _best_late(ordered if use_mtime else oldest_first(ordered), best)
    if len(ordered) > 1 and same_place(ordered[-2], best):
        limit = max(limit, 2)
    kept = [os.fspath(path) for path in keep]
    return [p for p in ordered[: max(0, len(ordered) - limit)] if not any(same_place(p, k) for k in kept)]


def rotate_checkpoints(
    output_dir: Path,
    save_total_limit: int | None = None,
    best_model_checkpoint: str | None = None,
    use_mtime: bool = False,
    checkpoint_prefix: str = CHECKPOINT_PREFIX,
    deleter: Callable[[str], None] | None = None,
) -> None:
    """Delete the oldest checkpoints until `save_total_limit` are left; call it after the newest one is durable.

    Where none of those that stay is whole, the newest whole one among the others stays too. `deleter`: of
    `commit.remove`.
    """
    if save_total_limit is None or save_total_limit < 1:
        return
    select = {"use_mtime": use_mtime, "checkpoint_prefix": checkpoint_prefix}
    # After a resume from an older checkpoint the one just written need not have the highest number.
    written = sort_checkpoints(output_dir, checkpoint_prefix, use_mtime=True)[-1:]
    going = checkpoints_to_delete(output_dir, save_total_limit, best_model_checkpoint, written, **select)  # type: ignore[arg-type]
    if not going:
        return
    staying = [p for p in sort_checkpoints(output_dir, checkpoint_prefix) if p not in going and is_ours(p)]
    if all(problems(path, deep=False) for path in reversed(staying)):
        last_good = next((path for path in reversed(going) if not problems(path, deep=False)), None)
        if last_good is not None:
            logger.warning("None of %s is whole, so %s is kept beyond save_total_limit.", staying, last_good)
            going.remove(last_good)
    for path in going:
        logger.info("Deleting %s because of save_total_limit=%s.", path, save_total_limit)
        remove(path, deleter)


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
            continue  # what was staged for it has just taken its place
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


def same_place(path: str, other: str | None) -> bool:
    """Whether two paths lead to the same directory; False for None."""
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


def _wait_for_writers(output_dir: Path) -> None:
    """Let the writers of runs that died (`async_save`) finish what they were given: it is newer than all else here."""
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
    """Whether another process that can have made `path` runs here as `pid`. Our own is a left-over: nothing is staged
    before training.
    """
    if pid == os.getpid() or not 0 < pid <= _MOST_PID:
        return False
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    fields = _status(pid)
    if fields and int(fields[6]) & _ENDING:  # also one that has ended, and nobody has asked how
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs for someone else
        pass
    # Numbers are given again, in containers soon: a process that is younger than the directory did not make it.
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
