"""Pushes that run in the background during training.

Owns: the order of pushes, which snapshots are superseded, what of them has failed. Leaves to others: the upload (push),
the files in a snapshot (staging), what is said at the end (session).

One push runs at a time, in a thread. A snapshot that is added meanwhile waits; with `always_push` each one is pushed,
else only the newest: it holds all that those before it had. One that fails is tried again at the end, unless a newer
one was pushed. The thread ends with the process, so that Ctrl-C is not waited for.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainwright.hub.retry import may_pass, one_line

logger = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """Files of one push, in a directory that nobody else writes into."""

    directory: str
    message: str
    checkpoints: tuple[str, ...] = ()  # names of directories in it, which later pushes leave out
    replaces: str | None = None  # a folder of the repository whose other files are deleted

    def leave_out(self, checkpoints: set[str]) -> None:
        """Remove those of `checkpoints`, which were pushed since it was made."""
        for name in checkpoints.intersection(self.checkpoints):
            shutil.rmtree(os.path.join(self.directory, name), ignore_errors=True)

    def discard(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


class PushQueue:
    """The pushes of one session, in order."""

    def __init__(self, upload: Callable[[Snapshot, threading.Event], Any], always_push: bool = False) -> None:
        """upload: pushes a snapshot, or raises; it waits for nothing once the event is set. always_push: push each
        snapshot, also those that a newer one supersedes (`hub_always_push`).
        """
        self.always_push = always_push
        self.pushed_checkpoints: set[str] = set()
        self._upload = upload
        self._changed = threading.Condition()  # of what follows
        self._waiting: list[Snapshot] = []
        self._running: Snapshot | None = None
        self._failed: Snapshot | None = None  # the newest, unless one was pushed after it
        self._error: BaseException | None = None
        self._hurry = threading.Event()
        self._said: set[str] = set()

    def add(self, snapshot: Snapshot) -> None:
        """Push `snapshot` as soon as those before it are done. It is discarded then."""
        with self._changed:
            self._hurry.clear()
            if not self.always_push:
                self._discard_waiting()
            self._discard_failed()
            self._waiting.append(snapshot)
            self._start()

    def is_done(self) -> bool:
        """Whether nothing runs or waits; a push may have failed."""
        with self._changed:
            return self._running is None and not self._waiting

    def wait_until_done(self, *, again: bool = False, hurry: bool = False) -> BaseException | None:
        """Return when all pushes have ended: the error of the newest one, None where that is on the Hub.

        again: try one that failed once more, where that may help. hurry: wait for no retries.
        """
        if hurry:
            self._hurry.set()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._running is None and not self._waiting)
                if again and self._failed is not None and self._error is not None and may_pass(self._error):
                    snapshot, self._failed = self._failed, None
                    self._waiting.append(snapshot)
                    self._start()
                    self._changed.wait_for(lambda: self._running is None and not self._waiting)
                return self._error if self._failed is not None else None
        finally:
            self._hurry.clear()

    def abandon(self) -> bool:
        """Push nothing more, and wait for nothing. Whether something is not on the Hub."""
        with self._changed:
            self._hurry.set()
            is_missing = self._running is not None or bool(self._waiting) or self._failed is not None
            self._discard_waiting()
            self._discard_failed()
            return is_missing

    def forget_failure(self) -> None:
        """It was said."""
        with self._changed:
            self._discard_failed()

    def _discard_waiting(self) -> None:
        for snapshot in self._waiting:
            snapshot.discard()
        self._waiting.clear()

    def _discard_failed(self) -> None:
        if self._failed is not None:
            self._failed.discard()
        self._failed = self._error = None

    def _start(self) -> None:
        if self._running is None:
            self._running = self._waiting.pop(0)
            threading.Thread(target=self._work, name="trainwright-hub-push", daemon=True).start()

    def _work(self) -> None:
        while True:
            snapshot = self._running
            assert snapshot is not None  # this thread's
            snapshot.leave_out(self.pushed_checkpoints)
            error: BaseException | None = None
            try:
                self._upload(snapshot, self._hurry)
            except BaseException as raised:  # whatever it is, somebody may wait for this thread
                error = raised
                self._warn(raised)
            with self._changed:
                if error is None:
                    self.pushed_checkpoints.update(snapshot.checkpoints)
                if error is None or self._waiting:  # a newer one has the same files
                    snapshot.discard()
                else:
                    self._failed, self._error = snapshot, error
                self._running = self._waiting.pop(0) if self._waiting else None
                self._changed.notify_all()
                if self._running is None:
                    return

    def _warn(self, error: BaseException) -> None:
        text = one_line(error)
        say = logger.info if text in self._said else logger.warning
        self._said.add(text)
        say("A push to the Hub failed; training continues, and the next push brings the same files: %s", text)
