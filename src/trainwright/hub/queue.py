"""Pushes that run in the background during training.

Owns: whether the next push may start, and handling one that fails. Leaves to others: the upload (push) and the files in
it (staging). A failed push is a warning, because the next one or the final one has the same files.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future, wait
from typing import Any

from trainwright.hub.push import push_staged
from trainwright.hub.staging import LAST_CHECKPOINT, checkpoint_files, checkpoints_in, remove_stale_stages, stage
from trainwright.names import HubStrategy

logger = logging.getLogger(__name__)


class PushInProgress:
    """Background pushes that may not be done yet."""

    def __init__(self, jobs: list[Future[Any]] | None = None) -> None:
        self.jobs = list(jobs or [])

    def is_done(self) -> bool:
        """Whether all of them have ended, successfully or not."""
        return all(job.done() for job in self.jobs)

    def wait_until_done(self) -> None:
        """Return when all of them have ended."""
        wait(self.jobs)


class PushQueue(PushInProgress):
    """The pushes of one run, in order."""

    def __init__(self, always_push: bool = False) -> None:
        """`always_push`: start a push although the last one still runs (`hub_always_push`)."""
        super().__init__()
        self.always_push = always_push
        self._checkpoints_in: dict[Future[Any], tuple[str, ...]] = {}  # a running push -> names of checkpoints in it
        self._pushed_checkpoints: set[str] = set()
        self._is_clean = False

    def add(self, job: Future[Any], checkpoints: tuple[str, ...] = ()) -> None:
        """Track `job`; it contains `checkpoints` (names of directories), which later pushes then leave out."""
        self._collect_finished()
        self.jobs.append(job)
        self._checkpoints_in[job] = checkpoints

    def is_done(self) -> bool:
        """Whether all pushes have ended; each that failed is a warning."""
        self._collect_finished()
        return not self.jobs

    def wait_until_done(self) -> None:
        """Return when all pushes have ended; each that failed is a warning."""
        super().wait_until_done()
        self._collect_finished()

    def _collect_finished(self) -> None:
        """Remove pushes that have ended; warn of failed ones."""
        for job in [job for job in self.jobs if job.done()]:
            self.jobs.remove(job)
            checkpoints = self._checkpoints_in.pop(job)
            error = job.exception()
            if error is None:
                self._pushed_checkpoints.update(checkpoints)
            else:
                logger.warning("A push to the Hub failed; the next one brings the same files: %s", error)

    def push_checkpoint(
        self,
        repo_id: str,
        output_dir: str,
        checkpoint_dir: str,
        *,
        strategy: HubStrategy | str,
        message: str,
        token: str | None = None,
        revision: str | None = None,
    ) -> bool:
        """Push the files of `strategy` after a save, as one commit. False where nothing was started.

        Nothing starts with strategy "end", or while the last push still runs unless `always_push`.
        """
        strategy = HubStrategy(strategy)
        if strategy is HubStrategy.END or not (self.is_done() or self.always_push):
            return False
        if not self._is_clean:
            remove_stale_stages(output_dir)
            self._is_clean = True
        checkpoints: tuple[str, ...] = ()
        if strategy is HubStrategy.ALL_CHECKPOINTS:
            checkpoints = tuple(name for name in checkpoints_in(output_dir) if name not in self._pushed_checkpoints)
        files = checkpoint_files(output_dir, checkpoint_dir, strategy, self._pushed_checkpoints)
        job = push_staged(
            repo_id,
            stage(files, directory=os.fspath(output_dir)),
            message=message,
            token=token,
            revision=revision,
            # Files that only the previous checkpoint has would be mixed with this one's.
            delete_patterns=[f"{LAST_CHECKPOINT}/*"] if strategy is HubStrategy.CHECKPOINT else None,
        )
        self.add(job, checkpoints)
        return True
