"""Loader workers that die or hang, replaced while the run continues.

Owns: `RecoveringIterator`. Leaves to others: going to a position in the data (seek), making a batch again as it was
(batch_seeds). A run without workers uses nothing of this.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from trainwright.seeding import RngState

logger = logging.getLogger(__name__)

MAX_RECOVERIES = 3  # for the same batch; each batch that arrives resets the count


class WorkerLost(RuntimeError):
    """A batch whose worker died or hung again and again."""


def is_worker_loss(error: BaseException) -> bool:
    """Whether a worker is gone or gave no answer in time. An error of the data set, which torch passes on with the
    words "Caught ... in DataLoader worker process", is neither.
    """
    text = str(error)
    if "in DataLoader worker process" in text:
        return False
    if isinstance(error, (ConnectionError, EOFError)):  # a batch was half received when its worker went
        return True
    return any(words in text for words in ("exited unexpectedly", "is killed by signal", "DataLoader timed out"))


class RecoveringIterator:
    """The batches of an epoch; when a worker is lost, new ones start at the batch that is missing, at most three times.

    `begin(number, one_worker)`: an iterator that starts after so many batches of this one; with `one_worker`, by one
    that makes one batch at a time, so that what it dies of is the batch that is asked for. `describe(number)`: what
    that batch holds, for the error. `epoch_start`: generator states under which a stream gives the same samples again.
    """

    def __init__(
        self,
        begin: Callable[[int, bool], Iterator[Any]],
        describe: Callable[[int], str],
        epoch_start: dict[str, Any] | None = None,
    ) -> None:
        self._begin, self._describe, self._epoch_start = begin, describe, epoch_start
        self._num_given = 0
        self._iterator: Iterator[Any] | None = begin(0, False)
        _leave_losses_to_us()

    def __iter__(self) -> RecoveringIterator:
        return self

    def __next__(self) -> Any:
        for recovery in range(MAX_RECOVERIES + 1):
            try:
                assert self._iterator is not None
                batch = next(self._iterator)
            except (RuntimeError, ConnectionError, EOFError) as error:
                if not is_worker_loss(error):
                    raise
                what = self._describe(self._num_given)
                if recovery == MAX_RECOVERIES:
                    raise WorkerLost(
                        f"Loader workers were lost {recovery + 1} times over {what}: {error} A sample that crashes or "
                        "blocks its worker is the likely cause (or, when they are killed, too little memory: use fewer "
                        "workers). Read it with dataloader_num_workers=0 to see the error."
                    ) from error
                logger.warning("A loader worker was lost (%s). Starting new ones at %s.", error, what)
                self._recover(one_worker=recovery >= 1)
            else:
                self._num_given += 1
                return batch
        raise AssertionError("unreachable")

    def _recover(self, one_worker: bool) -> None:
        self._iterator = None  # ends the other workers before new ones start
        rng = RngState.capture()  # a new loader draws a seed, which the run must not notice
        if self._epoch_start is not None:
            RngState.from_json(self._epoch_start).restore()
        try:
            self._iterator = self._begin(self._num_given, one_worker)
        finally:
            rng.restore()
        _leave_losses_to_us()


def _leave_losses_to_us() -> None:
    """Keep torch from raising in whatever code happens to run when a worker dies: in the middle of a step nothing could
    be saved. Without its handler the loss is found when the next batch is asked for, within five seconds."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and (getattr(handler, "__module__", None) or "").startswith("torch."):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
