"""The checkpoints of a directory: their names, which run wrote each, which is the newest, and which may go.

Owns: `checkpoint-N` directories of one output directory, the record of a run ("run" in `loop_state.json`). Leaves to
others: what they hold (manifest.py), how one appears and goes (commit.py). A directory is ours if it holds a manifest
or a trainer state; no other is ever deleted. Source: seed 001 (`save_total_limit`, `load_best_model_at_end`).

A number alone does not tell: a run that starts anew in the directory of one that came further has the lower numbers. A
run that is resumed from the newest checkpoint of a directory continues it, and keeps its record. Every other one is a
new run, later than all that are there: one that starts anew, or goes back to an older checkpoint, or comes from another
directory. What has no record (other implementations, older releases) counts as one run, as old as its newest file.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from typing import Any

from trainwright.checkpoint.commit import remove
from trainwright.checkpoint.json_files import read_run_record
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.paths import INCOMPLETE_NAME, is_ours
from trainwright.checkpoint.paths import step_of as step_of  # where others look for it
from trainwright.names import CHECKPOINT_PREFIX, LOOP_STATE_NAME, TRAINER_STATE_NAME

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]
# "id"; "started_ns": since 1970, later than those of the runs before it in a directory; "jobs": of which it is part,
# where a job can be restarted.
Record = dict[str, Any]


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

    The best one is moved to the place before the last, so that deleting from the front deletes it late. A link
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

    Those of earlier runs go before those of the newest, within a run the lowest step first. The newest and the best
    always stay, so a limit of 1 keeps two where they differ. Those in `keep` stay as well, beyond the limit. No limit,
    or one below 1, deletes nothing.
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


def same_place(path: str, other: str | None) -> bool:
    """Whether two paths lead to the same directory; False for None."""
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


# -- which run wrote a checkpoint --------------------------------------------------------------------------------------

_Found = tuple[tuple[int, ...], Record]  # a record, and in which file
_known: dict[str, _Found] = {}  # by path, of the checkpoints that were put in order last: no more than there are
_written: dict[str, _Found] = {}  # of the one that this process wrote last


def record_of(checkpoint: str) -> Record | None:
    """The record of the run that wrote `checkpoint`, or None; not read again while its file is the same."""
    path = os.path.join(checkpoint, LOOP_STATE_NAME)
    try:
        known = _written.get(os.path.abspath(path)) or _known.get(os.path.abspath(path))
        if known is not None and known[0] == _identity(path):
            return known[1]
        return read_run_record(path)
    except (OSError, ValueError):  # another's, an older release's, or damaged
        return None


def note(checkpoint: str, record: Record | None) -> None:
    """This run, of `record`, has just written `checkpoint`: it need not be read to know that."""
    path = os.path.join(checkpoint, LOOP_STATE_NAME)
    _written.clear()
    if record is not None:
        with suppress(OSError):  # of a process that writes none
            _written[os.path.abspath(path)] = _identity(path), record


def _remember(records: dict[str, Record | None]) -> None:
    _known.clear()
    for checkpoint, record in records.items():
        path = os.path.join(checkpoint, LOOP_STATE_NAME)
        if record is not None:
            with suppress(OSError):  # it was just deleted
                _known[os.path.abspath(path)] = _identity(path), record


def _identity(path: str) -> tuple[int, ...]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def wrote(run: Record | None, checkpoint: str) -> bool:
    """Whether `checkpoint` is there and has the record `run`."""
    record = record_of(checkpoint)
    return run is not None and record is not None and record["id"] == run["id"]


def oldest_first(checkpoints: Iterable[str]) -> list[str]:
    """`checkpoints`, which come in the order of their steps, by the run that wrote them, the newest run last."""
    ordered = list(checkpoints)
    started = _started_ns(ordered)
    return sorted(ordered, key=lambda path: started[path])  # steps stay in order within a run


def of_earlier_runs(checkpoints: Iterable[str]) -> list[str]:
    """Those of `checkpoints` that another run than the newest wrote."""
    started = _started_ns(list(checkpoints))
    newest = max(started.values(), default=0)
    return [path for path, when in started.items() if when < newest]


def continued(checkpoint: str | None, others: list[str], jobs: Sequence[str] = ()) -> Record:
    """The record of a run that begins at `checkpoint` (None: anew), where `others` are there already."""
    ordered = oldest_first(others)
    of_jobs: Record = {"jobs": list(jobs)} if jobs else {}
    if checkpoint is not None and ordered and os.path.realpath(checkpoint) == os.path.realpath(ordered[-1]):
        record = record_of(checkpoint)
        if record is not None:
            return {**record, **of_jobs}
    latest = max(_started_ns(ordered).values(), default=0)
    started_ns = max(time.time_ns(), latest + 1)  # the clock may have been put back
    return {"id": uuid.uuid4().hex, "started_ns": started_ns, **of_jobs}


def newest_of_jobs(checkpoints: Iterable[str], jobs: Container[str]) -> str | None:
    """The newest of `checkpoints`, where a run that is part of one of `jobs` wrote it; else None."""
    ordered = oldest_first(checkpoints)
    record = record_of(ordered[-1]) if ordered else None
    return ordered[-1] if record is not None and any(job in jobs for job in record.get("jobs") or ()) else None


def _started_ns(checkpoints: list[str]) -> dict[str, int]:
    """When the run of each of `checkpoints` began."""
    records = {path: record_of(path) for path in checkpoints}
    _remember(records)
    without = [path for path, record in records.items() if record is None]
    newest = max((modified_ns(path) for path in without if is_ours(path)), default=0)
    return {path: record["started_ns"] if record is not None else newest for path, record in records.items()}


def modified_ns(checkpoint: str) -> int:
    """When `checkpoint` was written, in nanoseconds since 1970; 0 where that cannot be seen."""
    for path in (os.path.join(checkpoint, TRAINER_STATE_NAME), checkpoint):
        try:
            return os.stat(path).st_mtime_ns
        except OSError:
            continue
    return 0
