"""`metrics.jsonl` in the directory of a run: one JSON object per log line, there as soon as the line is logged.

Owns: the file: what a line is called in it, what a resumed run cuts off, reading it. Leaves to others: what is logged
(`Trainer.log`), drawing it (`history`).

A line holds `step`, `epoch`, `time` (seconds since 1970), the values, and `run_id`, the first digits of the record that
the checkpoints of the run have. The first line of each attempt also says in `about_run` what the run is (`run_facts`),
and `run_warnings` of a line are the warnings since the one before: no line is there that the history lacks. NaN and
infinity are the texts "NaN", "Infinity" and "-Infinity", which JSON can hold and `float` reads. It costs one write to
an open file and no fsync: what was logged outlives the process, not a power failure. The file is appended to, by one
run after the other; a run that is resumed cuts what it will log again. It never ends a run: what cannot be written is
one warning.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from trainwright.checkpoint.json_files import MOST_STEPS
from trainwright.checkpoint.paths import MAX_JSON_BYTES, Damaged, inside
from trainwright.log_values import plain_value
from trainwright.names import METRICS_NAME
from trainwright.redact import without_passwords
from trainwright.safe_write import check_place, earlier_bytes, write_bytes

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]

ID_DIGITS = 8
LAST_LINE = "train_runtime"  # is in the last line that `train()` logs
ABOUT, WARNINGS = "about_run", "run_warnings"
_OURS = ("time", "run_id", ABOUT, WARNINGS)  # which the history does not have
# No link is followed, and a named pipe that was put there is not waited for.
_CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_encode = json.JSONEncoder(allow_nan=False, default=plain_value).encode


class Watcher(Protocol):
    """What follows the file of a run: the page that shows it."""

    def added(self) -> None:
        """A line was added."""

    def closed(self) -> None:
        """The run is over, or a line came after its end."""


class SeenWarnings(logging.NullHandler):
    """Collects the warnings of this package's loggers while it is attached. It shows none, as its base class says, so
    that they are still written where no other handler shows them.
    """

    MOST, LONGEST = 50, 1000  # texts, and characters of one

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.new: list[str] = []  # since they were last written
        self._seen: set[str] = set()

    def handle(self, record: logging.LogRecord) -> bool:
        try:
            text = without_passwords(record.getMessage())[: self.LONGEST]
        except Exception:  # a broken record is the business of those who show it
            return False
        if text not in self._seen and len(self._seen) < self.MOST:
            self._seen.add(text)
            self.new.append(text)
        return True


class MetricsFile:
    """The lines of one run, on its first process. Opened at the first line; after `close` each line opens it anew."""

    def __init__(
        self, directory: Path, run_id: str, watcher: Watcher | None = None, warnings: SeenWarnings | None = None
    ) -> None:
        """`run_id`: of the record of the run; a resumed run continues the lines with that of its checkpoint."""
        self.about: Mapping[str, Any] = {}  # facts of the run, for the next line
        self._watcher, self._warnings = watcher, warnings
        self.path = os.path.join(os.fspath(directory), METRICS_NAME)
        self.num_writes = 0
        self._run_id = run_id[:ID_DIGITS]
        self._descriptor: int | None = None
        self._is_closed = False  # the run is over
        self._has_lines = False  # of this run, as far as is known without reading the file
        self._has_warned = self._is_torn = False  # the last line was written in part

    def add(self, line: Mapping[str, Any]) -> None:
        """Append `line`, an element of the history."""
        texts = list(self._warnings.new) if self._warnings is not None else []
        more = {name: value for name, value in ((ABOUT, self.about), (WARNINGS, texts)) if value and name not in line}
        try:
            self._write(self._encoded({**line, "time": line.get("time", round(time.time(), 3)), **more}))
            self._has_lines, self.about = True, {}
            if self._warnings is not None:
                del self._warnings.new[: len(texts)]
        except OSError as error:
            self._warn(error)
        if self._is_closed:
            self.close()
        elif self._watcher is not None:
            self._watcher.added()

    def begin(self, history: Sequence[Mapping[str, Any]], step: int, *, is_resumed: bool) -> None:
        """An attempt begins after `step` updates, with the `history` that its checkpoint has; empty: anew.

        Of this run's lines those after `step` are removed, since they will be logged again, and at `step` those that
        the history does not have; but for the end of a `train()` that is now continued, and what follows it. Lines of
        the history that the file lacks are added, without a time: those of a checkpoint from another directory. Lines
        of other runs stay.
        """
        if not (is_resumed or self._has_lines):
            return
        self._close_file()
        try:
            before = _read(self.path) if os.path.lexists(self.path) else b""
            after = self._cut(before, history, step)
            if after != before:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                write_bytes(self.path, after)
        except (OSError, ValueError) as error:
            self._warn(error)
        self._has_lines, self._is_closed = True, False

    def close(self) -> None:
        """The run is over, however it ended."""
        self._is_closed = True
        self._close_file()
        if self._watcher is not None and self._has_lines:
            self._watcher.closed()

    def _close_file(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.close(descriptor)
            except OSError as error:  # where a network file system reports a failed write
                self._warn(error)

    def _write(self, text: bytes) -> None:
        descriptor = self._descriptor if self._descriptor is not None else self._open()
        if os.fstat(descriptor).st_nlink == 0:
            self._warn(FileNotFoundError("it was deleted; the next lines are in a new file"))
            os.close(descriptor)
            descriptor = self._open()
        if self._is_torn:
            text = b"\n" + text
        self.num_writes += 1
        written = os.write(descriptor, text)
        self._is_torn = written < len(text)
        if self._is_torn:
            raise OSError(f"{written} of {len(text)} bytes were written")

    def _open(self) -> int:
        self._descriptor = None
        check_place(self.path)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        # A line that a crash cut in two would join the first of this run; a link leads to what is not ours.
        is_shared = os.path.lexists(self.path) and os.lstat(self.path).st_nlink > 1
        if os.path.islink(self.path) or is_shared or not _ends_with_line(self.path):
            write_bytes(self.path, _whole_lines(earlier_bytes(self.path)))
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _CAREFULLY, 0o666)
        return self._descriptor

    def _encoded(self, line: Mapping[str, Any]) -> bytes:
        first = {name: line[name] for name in ("step", "epoch", "time") if name in line}
        line = {**first, **line, "run_id": self._run_id}
        try:
            text = _encode(line)
        except ValueError:  # NaN or infinity
            text = _encode(_without_nonfinite(line))
        return f"{text}\n".encode()

    def _cut(self, content: bytes, history: Sequence[Mapping[str, Any]], step: int) -> bytes:
        whole = _whole_lines(content)
        others: list[bytes] = []
        mine: list[tuple[dict[str, Any], bytes]] = []
        mark = self._run_id.encode()
        for text in whole.splitlines(keepends=True):
            line = _parsed(text) if mark in text else None
            if line is not None and line.get("run_id") == self._run_id:
                mine.append((line, text))
            else:
                others.append(text)
        here = [item for item in mine if item[0]["step"] == step]
        num_known = sum(line.get("step") == step for line in history)
        end = next((i for i in range(num_known, len(here)) if LAST_LINE in here[i][0]), len(here))
        left = [item for item in mine if item[0]["step"] < step] + here[:num_known] + here[end:]
        known = {_key(line) for line, _ in left}
        missing = [(dict(line), self._encoded(line)) for line in history if _key(line) not in known]
        if len(left) == len(mine) and not missing:
            return whole
        # Stable: the lines of a step stay in order.
        left = sorted([*left, *missing], key=lambda item: item[0].get("step", 0))
        return b"".join((*others, *(text for _, text in left)))

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s lacks lines of this run, which continues (said once): %s: %s",
                self.path,
                type(error).__name__,
                error,
            )


class RunLines(NamedTuple):
    """The log lines of a run, what it is (`run_facts`; the last attempt counts), its warnings in their order."""

    lines: list[dict[str, Any]]
    about: dict[str, Any]
    warnings: list[str]


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of the run that logged last into `directory`, in the order of the file, as the history has them, with
    `time` and `run_id`. Empty without a file. What is no line of ours, or torn, is left out. Raises ValueError where
    the file is a link, no plain file, or larger than any run writes.
    """
    return read_run(directory).lines


def read_run(directory: Path) -> RunLines:
    """`read_metrics`, with what the lines say of the run itself. Errors as there."""
    path = os.path.join(os.fspath(directory), METRICS_NAME)
    if not os.path.lexists(path):
        return RunLines([], {}, [])
    every = [line for text in _read(path).splitlines() if (line := _parsed(text)) is not None]
    lines = [line for line in every if line.get("run_id") == every[-1].get("run_id")]
    about: dict[str, Any] = {}
    warnings: dict[str, None] = {}  # an ordered set
    for line in lines:
        facts, texts = line.pop(ABOUT, None), line.pop(WARNINGS, None)
        if isinstance(facts, dict):
            # A resumed run began when its first attempt did.
            about = {**facts, **{name: about[name] for name in ("started",) if name in about}}
        if isinstance(texts, list):
            warnings.update(dict.fromkeys(map(str, texts)))
    return RunLines(lines, about, list(warnings))


def is_same_run(lines: Iterable[Mapping[str, Any]], history: Iterable[Mapping[str, Any]]) -> bool:
    """Whether `lines`, of `read_metrics`, begin as the `history` of a trainer state does."""
    first, other = next(iter(lines), None), next(iter(history), None)
    return first is not None and other is not None and _key(first) == _key(other)


def _key(line: Mapping[str, Any]) -> str:
    """A text that is the same for a line of the history and for that of the file."""
    shown = {name: line[name] for name in line if name not in _OURS}
    return json.dumps(_without_nonfinite(shown), sort_keys=True, default=plain_value)


def _read(path: str) -> bytes:
    inside(os.path.dirname(path) or ".", os.path.basename(path))
    size = os.path.getsize(path)
    if size > MAX_JSON_BYTES:
        raise Damaged(path, f"it has {size} bytes, more than {MAX_JSON_BYTES}, and was not read.")
    with open(path, "rb") as file:
        return file.read()


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # torn, or another's
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if type(step) is int and 0 <= step <= MOST_STEPS else None


def _ends_with_line(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                return file.read(1) == b"\n"
    except FileNotFoundError:
        pass
    return True


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _without_nonfinite(value: Any) -> Any:
    """
    >>> _without_nonfinite({"loss": float("nan"), "a": [1.0, float("-inf")]})
    {'loss': 'NaN', 'a': [1.0, '-Infinity']}
    """
    if isinstance(value, Mapping):
        return {name: _without_nonfinite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
