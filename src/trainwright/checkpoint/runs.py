"""Which run wrote a checkpoint, and which checkpoint is the newest where several runs wrote into one directory.

Owns: the record of a run ("run" in `loop_state.json`), the order of runs. Leaves to others: names and steps
(layout.py), what is deleted (layout.py) and resumed (load.py) in that order.

A number alone does not tell: a run that starts anew in the directory of one that came further has the lower numbers. A
run that is resumed from the newest checkpoint of a directory continues it, and keeps its record. Every other one is a
new run, later than all that are there: one that starts anew, or goes back to an older checkpoint, or comes from another
directory. What has no record (other implementations, older releases) counts as one run, as old as its newest file.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from trainwright.checkpoint.json_files import read_run_record
from trainwright.checkpoint.paths import is_ours
from trainwright.names import LOOP_STATE_NAME, TRAINER_STATE_NAME

Record = dict[str, Any]  # "id"; "started_ns": since 1970, later than those of the runs before it in a directory


_known: dict[str, tuple[tuple[int, ...], Record]] = {}  # by path: what was found, and in which file


def record_of(checkpoint: str) -> Record | None:
    """The record of the run that wrote `checkpoint`, or None. One that was read is not read again until the file that
    it is in has changed.
    """
    path = os.path.join(checkpoint, LOOP_STATE_NAME)
    try:
        identity = _identity(path)
        known = _known.get(os.path.abspath(path))
        if known is not None and known[0] == identity:
            return known[1]
        record = read_run_record(path)
    except (OSError, ValueError):  # another's, an older release's, or damaged
        return None
    if record is not None:
        _known[os.path.abspath(path)] = identity, record
    return record


def note(checkpoint: str, record: Record | None) -> None:
    """This run, of `record`, has just written `checkpoint`: it need not be read to know that."""
    path = os.path.join(checkpoint, LOOP_STATE_NAME)
    if record is not None:
        with suppress(OSError):  # of a process that writes none
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


def continued(checkpoint: str | None, others: list[str]) -> Record:
    """The record of a run that begins at `checkpoint` (None: anew), where `others` are there already."""
    ordered = oldest_first(others)
    if checkpoint is not None and ordered and os.path.realpath(checkpoint) == os.path.realpath(ordered[-1]):
        record = record_of(checkpoint)
        if record is not None:
            return record
    latest = max(_started_ns(ordered).values(), default=0)
    return {"id": uuid.uuid4().hex, "started_ns": max(time.time_ns(), latest + 1)}  # the clock may have been put back


def _started_ns(checkpoints: list[str]) -> dict[str, int]:
    """When the run of each of `checkpoints` began."""
    records = {path: record_of(path) for path in checkpoints}
    without = [path for path, record in records.items() if record is None]
    newest = max((_modified_ns(path) for path in without if is_ours(path)), default=0)
    return {path: record["started_ns"] if record is not None else newest for path, record in records.items()}


def _modified_ns(checkpoint: str) -> int:
    for path in (os.path.join(checkpoint, TRAINER_STATE_NAME), checkpoint):
        try:
            return os.stat(path).st_mtime_ns
        except OSError:
            continue
    return 0
