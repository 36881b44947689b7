"""Asynchronous saves: one at a time, each as safe as one that the run waits for.

Owns: the save in flight, from its snapshot to what became of it; what happens when the process that writes is killed.
Leaves to others: the snapshot (snapshot.py), the process (writer.py), what follows a save that is done (Trainer).
Decision and promises: docs/decisions/0005-asynchronous-saves.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any

from trainwright.checkpoint import sink, writer
from trainwright.checkpoint.commit import delete, flush_parents, sibling
from trainwright.checkpoint.shared_memory import Arena, check_room
from trainwright.checkpoint.snapshot import Job, Snapshot
from trainwright.checkpoint.snapshot_layout import SnapshotLayout
from trainwright.forks import hold_alone
from trainwright.names import SaveStrategy
from trainwright.nonfinite.weights import NonFiniteWeights, nonfinite_tensors

if TYPE_CHECKING:
    import torch

    from trainwright.args.training import TrainingArguments
    from trainwright.checkpoint.frozen import FrozenWeights
    from trainwright.parallel.async_max import AsyncMax
    from trainwright.parallel.strategy import Strategy

logger = logging.getLogger(__name__)

MOST_DEATHS = 3  # processes that are started anew, before saves are made by the run itself
MOST_WAIT_S = 600.0  # for a writer that has only to end; one that writes is waited for, with a line as often as this
_LONG_WAIT_S = 0.01  # a wait for the save before that is worth a line
_LOOK_S = 1.0  # how often a wait looks whether the writer lives, which a copy of its end of the line could hide


class AsyncSaves:
    """The saves of one run, written by a process that is started once, before the first of them.

    `staged` takes the place of `save.staged`: it ends when the state is copied. `begin` starts the writing, and from
    then on `in_flight` is true, until `finish`. Of several ranks only the first (`is_main`) has a writer; `agreement`
    lets the others know when it is done, so that all continue from the same step. With `writes_parts` each has one, for
    its part, and that of the first commits when the parts of all are on the disk.
    """

    def __init__(
        self,
        num_bytes: int = 0,
        *,
        is_main: bool = True,
        agreement: AsyncMax | None = None,
        writes_parts: bool = False,
        rank: int = 0,
        num_processes_here: int = 1,
    ) -> None:
        self.in_flight = False
        self._has_writer, self._writes_parts, self._rank = is_main or writes_parts, writes_parts, rank
        self._num_copying = num_processes_here if writes_parts else 1  # processes of this machine, at once
        self.num_saves = self.num_waits = self.num_deaths = 0
        self.waited_s = 0.0
        self._is_main, self._agreement = is_main, agreement
        if self._has_writer:
            check_room(num_bytes)
        try:
            self._arena = Arena(num_bytes if self._has_writer else 0)  # the memory is made now
        except OSError as error:
            raise RuntimeError(
                f"async_save=True needs about {num_bytes / 2**30:.1f} GiB of shared memory, which the system refused: "
                f"{error}. Leave it out, and training waits for its checkpoints."
            ) from error
        self._known_blocks = 0  # what `num_made` of the arena was when its blocks were last sent to the writer
        self._process: writer.ProcessLike | None = None
        self._line: Any = None
        self._snapshot: Snapshot | None = None
        self._layouts: dict[str, SnapshotLayout] = {}  # by file, of the save before
        self._is_sent = False
        self._answer: dict[str, Any] | None = None
        self._is_answered = False
        self._doomed: list[str] = []  # directories sent to the writer to be deleted, since its last answer
        hold_alone(self)
        if self._has_writer:
            try:
                self._start()
            except OSError as error:
                raise RuntimeError(
                    f"async_save=True needs a second process, which could not be started: {error}. Leave it out, and "
                    "training waits for its checkpoints."
                ) from error

    @classmethod
    def for_run(
        cls, args: TrainingArguments, name: str, overridden: list[str], num_bytes: int, *, strategy: Strategy
    ) -> AsyncSaves | None:
        """What `args` ask for; None where there is nothing to write asynchronously.

        `name`: of the Trainer's class, `overridden`: those of `saves.HOOKS_THAT_WRITE` that it overrides. `num_bytes`:
        predicted size of what this rank writes. All ranks call it together. Raises MemoryError where the memory will
        not do.
        """
        if not args.async_save or args.save_strategy == SaveStrategy.NO:
            return None
        if "_save_checkpoint" in overridden:
            logger.info(
                "async_save: %s overrides _save_checkpoint, which may use what it wrote, so training waits for its "
                "saves.",
                name,
            )
            return None
        if overridden:
            logger.info(
                "async_save: %s overrides %s; training waits for what these write.", name, ", ".join(overridden)
            )
        agreement = None
        if strategy.is_distributed:
            from trainwright.parallel.async_max import AsyncMax

            agreement = AsyncMax(args.ddp_timeout_delta)
        return cls(
            num_bytes,
            is_main=strategy.is_main,
            agreement=agreement,
            writes_parts=strategy.writes_parts,
            rank=strategy.process_index,
            num_processes_here=strategy.num_processes_here,
        )

    @property
    def checks_weights(self) -> bool:
        """Whether saves refuse weights that are not finite (NonFiniteWeights), at the latest when they are over.

        Each of several ranks looks at its weights before the save, because all must refuse together; where each has a
        writer, one that finds some makes the save fail in all.
        """
        return self._agreement is None or self._writes_parts

    # -- a save --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def staged(
        self,
        final: str,
        *,
        step: int,
        world_size: int,
        position: dict[str, Any],
        frozen: FrozenWeights | None = None,
        folders: Iterable[str] = (),
        to_check: dict[str, torch.Tensor] | None = None,
    ) -> Iterator[str]:
        """As `save.staged`, but it ends when the state is copied; the directory gets its name when that is written.

        Files that a snapshot cannot hold are written at once. `to_check`: parameters that must be finite. After an
        exception nothing is in flight and `final` is as it was.
        """
        assert not self.in_flight, "one save at a time"
        self._ensure_writer()
        final = os.path.abspath(final)
        # The name says who works on it: for as long as that process runs, nobody cleans up here.
        staging = sibling(final, "staged", self._process.pid if self._process is not None else None)
        os.makedirs(os.path.dirname(final), exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        os.mkdir(staging)
        try:
            for folder in folders:
                os.makedirs(os.path.join(staging, folder))
            self._arena.clear()
            job = Job(staging, final, step, world_size, position)
            self._snapshot = Snapshot(self._arena, job, to_check, self._layouts, self._num_copying)
            files = frozen.files_of(staging, final) if frozen is not None else None
            with sink.opened(staging, sink.Sink(self._snapshot, files)):
                yield staging
            self._snapshot.finish()
            if frozen is not None and files is not None:
                frozen.note(final, files)
                job.frozen = files.entries
                self._snapshot.pass_over(files.linked)
            names = nonfinite_tensors(self._snapshot.to_check)  # those that were in no file of the snapshot
            if names:
                raise NonFiniteWeights(names)
        except BaseException:
            self._drop()
            shutil.rmtree(staging, ignore_errors=True)
            raise

    @contextlib.contextmanager
    def part_in(self, directory: str, to_check: dict[str, torch.Tensor]) -> Iterator[None]:
        """With `writes_parts`, around what each rank writes into `directory`, which the first has `staged`: all copy
        their parts at once, and before the first one's `staged` ends.
        """
        if self._is_main:
            yield
            assert self._snapshot is not None
            self._snapshot.finish()
            return
        self._ensure_writer()
        self._arena.clear()
        job = Job(directory, "", 0, 0, {}, rank=self._rank)
        self._snapshot = Snapshot(self._arena, job, to_check, self._layouts, self._num_copying)
        with sink.opened(directory, sink.Sink(self._snapshot)):
            yield
        self._snapshot.finish()
        names = nonfinite_tensors(self._snapshot.to_check)
        if names:
            raise NonFiniteWeights(names)

    def _drop(self) -> None:
        """Forget the save that was begun, and what was staged for it."""
        if self._snapshot is not None and self._is_main:
            shutil.rmtree(self._snapshot.job.staging, ignore_errors=True)
        self._snapshot, self.in_flight = None, False

    def begin(self, gather: Callable[[Any], list[Any]]) -> None:
        """What was staged is in flight from now on; called by every rank, after the last has written. `gather`: one
        value of each rank, in rank order.
        """
        if self._writes_parts:
            assert self._snapshot is not None
            of_all = gather([file.name for file in self._snapshot.job.files])
            if self._is_main:
                self._snapshot.job.others = [name for names in of_all[1:] for name in names]
        self.in_flight, self._is_sent, self._is_answered, self._answer = True, False, False, None
        self.num_saves += 1
        if not self._has_writer:
            return
        try:
            self._send(wait=False)
        except BaseException:
            self._drop()
            raise

    def is_done(self, wait: bool = False) -> bool:
        """Whether the save in flight is over, well or not. Costs two calls of the system while there is one.

        Several ranks learn what the first one knew when this was last asked, a step ago, so that none waits for others.
        """
        was_over = self._agreement is not None and bool(self._agreement.result())
        if self._agreement is not None and not wait:
            is_over = self._has_writer and self._is_over(wait=False)  # asked by each: a writer may have died
            if not was_over:
                self._agreement.start(int(self._is_main and is_over))
            return was_over
        return self._is_over(wait) if self._has_writer else wait

    def result(self) -> None:
        """End the save in flight; waits for it. Raises what its writing raised, after removing what was staged.

        A writer that died is named in the log, and the save is made here.
        """
        self.in_flight = False
        if not self._has_writer:
            return
        self._is_over(wait=True)
        assert self._snapshot is not None
        snapshot, self._snapshot = self._snapshot, None
        if not self._is_answered:
            snapshot.is_copied(wait=True)
            self._write_here(snapshot.job)
        elif self._answer is not None:
            if not self._writes_parts:
                shutil.rmtree(snapshot.job.staging, ignore_errors=True)
            raise writer.rebuilt(self._answer)

    def finish(self, first_error: Callable[[Exception | None], Exception | None]) -> None:
        """`result` for all ranks; raises in each what one of them raised (`Strategy.first_error`)."""
        staging = self._snapshot.job.staging if self._snapshot is not None else ""
        error: Exception | None = None
        try:
            self.result()
        except Exception as caught:
            error = caught
        failed = first_error(error)
        if failed is not None:
            if self._is_main:  # now that nobody writes there any more
                shutil.rmtree(staging, ignore_errors=True)
            raise failed

    def wait_before(self, step: int) -> None:
        """Wait for the save in flight, because that of `step` is to begin; counts it, and says so in the log."""
        if not self.in_flight:
            return
        start = time.monotonic()
        if self.is_done(wait=True) and (waited_s := time.monotonic() - start) > _LONG_WAIT_S:
            self.num_waits += 1
            self.waited_s += waited_s
            (logger.warning if self.num_waits == 1 else logger.info)(
                "Saving at step %d waited %.2f s for the save before it (%d of %d saves had to wait, %.2f s together): "
                "checkpoints are asked for faster than they are written.",
                step, waited_s, self.num_waits, self.num_saves + 1, self.waited_s,
            )  # fmt: skip

    def delete(self, path: str) -> bool:
        """Have the writer delete `path`, before the next save that it is sent. False: it cannot."""
        if self._process is None:
            return False
        try:
            self._line.send(("delete", path))
        except OSError:  # it died, which the next use of it shows
            return False
        self._doomed.append(path)
        return True

    def close(self, wait: bool = True) -> None:
        """See the save in flight through, whatever becomes of it, and end the writer. Without `wait`, the writer
        finishes it by itself.
        """
        is_idle = not self.in_flight
        try:
            if self.in_flight and self._has_writer:
                with contextlib.suppress(Exception):  # the run is over: nothing is left that could tolerate it
                    self.result() if wait else self._send(wait=True)
                is_idle = wait
        finally:  # also after a Ctrl-C while it waits
            self.in_flight = False
            if self._line is not None:
                writer.hang_up(self._line)
            if self._process is not None and is_idle and self._process.poll() is None:
                self._end(self._process)
            self._process = self._line = None
            if is_idle:
                self._delete_doomed()
            self._arena.close(is_over=is_idle)
            if self._agreement is not None:
                self._agreement.close()

    def hand_over(self, limit_s: float) -> None:
        """Another thread is about to end the process: the writer gets what is in flight, and `limit_s` to write it."""
        snapshot = self._snapshot
        if snapshot is None or not self.in_flight or not self._send(wait=True):
            return
        deadline = time.monotonic() + limit_s
        while os.path.lexists(snapshot.job.staging) and time.monotonic() < deadline:
            time.sleep(0.05)

    def let_go(self) -> None:
        """In a fork: the writer, and what it is to write and delete, belong to the run."""
        if self._line is not None:
            self._line.close()
        self._process = self._line = self._snapshot = None
        self._doomed, self.in_flight = [], False

    # -- the writer ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._process, self._line = writer.launch()
        self._known_blocks = 0

    def _end(self, process: writer.ProcessLike) -> None:
        """Wait for a writer that has at most directories to delete; for one that cannot, no longer than MOST_WAIT_S."""
        if self._doomed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(MOST_WAIT_S)
                return
            logger.warning(
                "The process that writes checkpoints (number %d) was asked to delete %s and is not done after %d s: it "
                "is ended. What is left of it is deleted when the run is resumed, or here: look at the disk.",
                process.pid, ", ".join(self._doomed), MOST_WAIT_S,
            )  # fmt: skip
            self._doomed = []
        os.kill(process.pid, signal.SIGKILL)  # it may still be importing what it needs
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a disk ends when that answers
            process.wait(MOST_WAIT_S)

    def _ensure_writer(self) -> None:
        """A writer that died between two saves is replaced, MOST_DEATHS times."""
        if self._process is not None and self._process.poll() is not None:
            self._note_death("between two saves", "Nothing is lost")
        if self._process is None and self.num_deaths <= MOST_DEATHS:
            try:
                self._start()
            except OSError as error:
                self.num_deaths += 1
                logger.warning("No new process could be started for writing checkpoints (%s): the run waits.", error)

    def _send(self, wait: bool) -> bool:
        """Send the snapshot to the writer once it is complete; whether it was sent."""
        assert self._snapshot is not None
        if self._is_sent or self._process is None:
            return True
        if not self._snapshot.is_copied(wait):
            return False
        place = self._arena.put(pickle.dumps(self._snapshot.job))
        self._is_sent = True
        with contextlib.suppress(OSError):  # it died, which waiting for the answer shows
            if self._known_blocks != self._arena.num_made:
                self._line.send(("blocks", [block.num_bytes for block in self._arena.blocks]))
                for block in self._arena.blocks:
                    reduction.send_handle(self._line, block.descriptor, self._process.pid)
                self._known_blocks = self._arena.num_made
            self._line.send(("save", *place))
        return True

    def _is_over(self, wait: bool) -> bool:
        """Whether the writer answered, or died; `wait` until it does."""
        if self._is_answered:
            return True
        if self._process is None:
            self._make_part()
            return True
        if not self._send(wait):
            return False
        try:
            if not self._has_answer(wait):
                return False
            self._answer, self._is_answered = self._line.recv(), True
            self._doomed = []
        except (EOFError, OSError):
            self._note_death("while it wrote a checkpoint", "This run makes that save itself")
            self._make_part()
        return True

    def _make_part(self) -> None:
        """Without a writer: what the one that commits waits for is written at once."""
        assert self._snapshot is not None
        if self._snapshot.job.rank is None:
            return
        self._snapshot.is_copied(wait=True)
        try:
            self._write_here(self._snapshot.job)
        except Exception as error:
            self._answer = writer.described(error)
        self._is_answered = True

    def _has_answer(self, wait: bool) -> bool:
        """Whether the line holds an answer, or its end; `wait` until it does. EOFError where the writer just died."""
        assert self._process is not None and self._snapshot is not None
        begin = last_line = time.monotonic()
        while not self._line.poll(_LOOK_S if wait else 0):
            if not wait:
                return False
            if self._process.poll() is not None and not self._line.poll(0):
                raise EOFError
            if (now := time.monotonic()) - last_line > MOST_WAIT_S:
                last_line = now
                logger.warning(
                    "%s is still being written, for %d s now, by process %d: the disk is slow, or does not answer.",
                    self._snapshot.job.final, now - begin, self._process.pid,
                )  # fmt: skip
        return True

    def _delete_doomed(self) -> None:
        """Delete what the writer died before deleting. A run that dies before has it deleted at its resume."""
        for path in self._doomed:
            if os.path.lexists(path):
                delete(path)
        self._doomed = []

    def _note_death(self, when: str, consequence: str) -> None:
        assert self._process is not None
        code = self._process.wait()
        self._line.close()
        self.num_deaths += 1
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        cause = " (too little memory is the usual reason)" if code == -signal.SIGKILL else ""
        future = "a new one is started for the next"
        if self.num_deaths > MOST_DEATHS:
            future = "that happened too often: from now on the run waits for its saves"
        logger.warning(
            "The process that writes checkpoints (number %d) %s%s %s. %s; %s.",
            self._process.pid, how, cause, when, consequence, future,
        )  # fmt: skip
        self._process = self._line = None
        self._delete_doomed()

    def _write_here(self, job: Job) -> None:
        """Make the save of a writer that died. All that it was sent is still in memory."""
        try:
            if os.path.lexists(job.staging):  # else it died after the checkpoint had got its name
                writer.write_and_commit(job, self._arena)
            elif job.rank is None:
                flush_parents(job.final)
        except BaseException:
            if not self._writes_parts:
                shutil.rmtree(job.staging, ignore_errors=True)
            raise
        finally:
            if job.rank is None:
                self._remove_leftovers(job)

    def _remove_leftovers(self, job: Job) -> None:
        """What the dead writer had moved aside, now that the new checkpoint has its name."""
        pid = int(job.staging.rpartition("-")[2])
        replaced = sibling(job.final, "replaced", pid)
        if os.path.lexists(replaced) and not os.path.lexists(job.final):
            os.rename(replaced, job.final)
        for purpose in ("replaced", "deleted"):
            shutil.rmtree(sibling(job.final, purpose, pid), ignore_errors=True)
