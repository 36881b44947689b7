"""The background writer: the process that writes checkpoints while training continues.

Owns: writing the files of a snapshot and committing them, here or in that process; the process, from its start
to its end. Leaves to others: taking snapshots (snapshot.py), deciding what to do when it fails (asynchronous.py).

It is a new program, not a fork: it shares neither the interpreter lock nor the memory of the run, knows nothing of the
user's script, and outlives the run for as long as a checkpoint takes that it was already sent. It ignores the signals
that end a run, which reach a whole process group.

The run says that it is over by shutting the line down, which no copy of its end in another process can prevent, as it
can a mere close: such a copy is in every process that the run forks. That the run died is noticed by its number.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection, Pipe
from typing import Any, Protocol

import torch

from trainwright.checkpoint import manifest, sink, snapshot
from trainwright.checkpoint.commit import delete, flush
from trainwright.checkpoint.paths import relative_files
from trainwright.checkpoint.save import commit
from trainwright.checkpoint.shared_memory import Arena, Place
from trainwright.names import SIGNALS, some
from trainwright.nonfinite.weights import NonFiniteWeights

LOOK_FOR_RUN_S = 1.0  # how often a writer that has nothing to do asks whether its run is still there
PATIENCE_S = 30.0  # for parts of other processes that do not grow, when the run is over
_LOOK_FOR_PARTS_S = 0.02
_UNFINISHED = ".unfinished"  # behind the name of a file that another process waits for
_FAILED = "FAILED-"
_PROGRAM = "from trainwright.checkpoint.writer import main; main()"  # layout.py finds the process by this text


class WriterError(RuntimeError):
    """What the process that writes checkpoints raised, where it is no exception that Python itself knows."""


class ProcessLike(Protocol):
    """What is asked of a process that was started."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, negative after a signal; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has one."""
        ...


def write_and_commit(job: snapshot.Job, arena: Arena, is_run_over: Callable[[], bool] = lambda: False) -> None:
    """Write the files of `job` into its staging directory and give the checkpoint its name, once those of other
    processes are there; where the job is a part, the process that commits waits for it.

    Raises NonFiniteWeights before anything is written where a parameter is not finite, and what another process raised.
    """
    if job.rank is not None:
        _write_part(job, arena)
        return
    _check(job, arena)
    for file in job.files:
        path = os.path.join(job.staging, file.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        sink.write_now(file.kind, path, snapshot.read(arena, file), file.metadata)
    _wait_for_parts(job, is_run_over)
    commit(job.staging, job.final, step=job.step, world_size=job.world_size, position=job.position, frozen=job.frozen)


def _check(job: snapshot.Job, arena: Arena) -> None:
    names = snapshot.nonfinite(arena, job.checked)
    if names:
        raise NonFiniteWeights(names)


# -- parts, of several processes ---------------------------------------------------------------------------------------


def _write_part(job: snapshot.Job, arena: Arena) -> None:
    """Each file gets its name once the disk has it; `FAILED-<rank>`, a file, says why one does not come, or where there
    is no room for that, a directory that none does.

    A second call, after a first that was killed, writes what is missing: what has its name may be in use.
    """
    try:
        _check(job, arena)
        for file in job.files:
            path = os.path.join(job.staging, file.name)
            if not os.path.lexists(path):
                sink.write_now(file.kind, path + _UNFINISHED, snapshot.read(arena, file), file.metadata)
                flush(path + _UNFINISHED)
                os.rename(path + _UNFINISHED, path)
    except BaseException as error:
        if not os.path.lexists(job.staging):  # it has its name, or was given up; the process that commits knows
            return
        failed = os.path.join(job.staging, f"{_FAILED}{job.rank}")
        try:
            for file in job.files:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(job.staging, file.name + _UNFINISHED))  # a disk that is full has room then
            sink.write_now("json", failed + _UNFINISHED, described(error))
            os.rename(failed + _UNFINISHED, failed)
        except OSError:  # a directory needs less room than a file
            os.mkdir(failed)
        raise


def _wait_for_parts(job: snapshot.Job, is_run_over: Callable[[], bool]) -> None:
    """Return when the files of all other processes have their names.

    While the run is there, it ends this wait where another process is lost. Later, PATIENCE_S without a sign of life.
    """
    missing, since = job.others, time.monotonic()
    seen: list[tuple[str, int]] = []
    while missing := [name for name in missing if not os.path.lexists(os.path.join(job.staging, name))]:
        for name in os.listdir(job.staging):
            path = os.path.join(job.staging, name)
            if name.startswith(_FAILED) and os.path.isdir(path):
                raise OSError(errno.EIO, "Another process could not write its part, nor say why", path)
            if name.startswith(_FAILED) and not name.endswith(_UNFINISHED):
                with open(path, encoding="utf-8") as file:
                    raise rebuilt(json.load(file))
        if is_run_over():
            now = [(name, os.path.getsize(os.path.join(job.staging, name))) for name in relative_files(job.staging)]
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                raise WriterError(f"{some(missing, 5)} of other processes did not come")
        time.sleep(_LOOK_FOR_PARTS_S)


# -- starting it -------------------------------------------------------------------------------------------------------


def launch() -> tuple[ProcessLike, Connection[Any, Any]]:
    """Start the process; (process, the line to it). Does not wait for it: it reads what was sent once it is ready."""
    ours, theirs = Pipe()
    number = theirs.fileno()
    program = f"import sys; sys.path[:] = {sys.path!r}; {_PROGRAM}"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # Blocked signals stay blocked in a program that is started, so that there is no moment without the shield.
    shielded = {getattr(signal, name) for name in SIGNALS if hasattr(signal, name)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, shielded)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(os.getpid()), str(number)],
            pass_fds=[number],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return process, ours


def hang_up(line: Connection[Any, Any]) -> None:
    """End the line to a writer: it finishes what it was sent, and ends."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(line.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
    line.close()


def main() -> None:
    """The program. Its last two arguments: the number of the run's process, the file descriptor of the line to it."""
    torch.set_num_threads(1)
    manifest.NUM_HASH_THREADS = 1  # the other cores are the run's
    _lower_priority()
    serve(Connection(int(sys.argv[-1])), int(sys.argv[-2]))
    os._exit(0)  # the run may wait for this: taking the interpreter down costs more than a small checkpoint


def _lower_priority() -> None:
    """Use idle cores only, and none of the run's at the moment that it hands over a save, which cost it up to 4 ms.
    Where every core trains, a quarter of one is left for this.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, or a sandbox that forbids it
        os.nice(5)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def serve(connection: Connection[Any, Any], run_pid: int) -> None:
    """Do what is asked until the run hangs up, or its process, our parent, is gone. What was asked is still done."""
    arena = Arena()
    while True:
        try:
            while not connection.poll(LOOK_FOR_RUN_S):
                if os.getppid() != run_pid and not connection.poll(0):
                    return
            what, *rest = connection.recv()
            if what == "delete":
                delete(*rest)
                continue
            if what == "blocks":
                arena.close()
                for num_bytes in rest[0]:
                    arena.adopt(reduction.recv_handle(connection), num_bytes)
                continue
        except (EOFError, OSError):
            return
        job = pickle.loads(arena.read(Place(*rest)))
        answer = None
        try:
            write_and_commit(job, arena, lambda: os.getppid() != run_pid or connection.poll(0))
        except BaseException as error:
            answer = described(error)
        try:
            connection.send(answer)
        except OSError:  # nothing is left that would clean up
            if answer is not None and job.rank is None:
                shutil.rmtree(job.staging, ignore_errors=True)
            return


# -- errors on the way back --------------------------------------------------------------------------------------------


def described(error: BaseException) -> dict[str, Any]:
    """An exception as plain values that survive the way to another process."""
    system = (error.errno, error.strerror, error.filename) if isinstance(error, OSError) else None
    return {
        "name": type(error).__name__,
        "system": system if system and system[0] is not None else None,
        "nonfinite": error.names if isinstance(error, NonFiniteWeights) else None,
        "text": str(error),
        "trace": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
    }


def rebuilt(description: dict[str, Any]) -> Exception:
    """The exception again, caused by the text of where it was raised."""
    result: Exception = WriterError(f"{description['name']}: {description['text']}")
    known = getattr(builtins, description["name"], None)
    if description["nonfinite"] is not None:
        return NonFiniteWeights(description["nonfinite"])
    if description["system"] is not None:
        result = OSError(*description["system"])
    elif isinstance(known, type) and issubclass(known, Exception):
        with contextlib.suppress(TypeError):  # those that need more than a text
            result = known(description["text"])
    result.__cause__ = WriterError(f"raised in the process that writes checkpoints:\n{description['trace']}")
    return result
