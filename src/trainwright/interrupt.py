"""Signals that end a run: caught at once, handled after the step, with a checkpoint.

Owns: `Interrupt` (the handlers, the signal agreed on by all ranks, what is said, the exit code), requeueing on Slurm,
abandoned evaluations, `rescue` (a checkpoint after an exception), `same_handlers` (for libraries that replace them).
Leaves to others: polling after each step and writing the checkpoint (the training loop), communication
(`parallel/signal_agreement`), keeping loader workers alive meanwhile (`data/workers`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from trainwright.forks import hold_alone
from trainwright.log_output import ERASE_DRAWN, can_erase
from trainwright.names import SIGNALS

logger = logging.getLogger(__name__)

# What a signal leads to, by where the run is.
BEFORE_STEPS = "the run stops before its first step, with nothing to save"
AMONG_STEPS = "the run stops after this step and saves a checkpoint"
AFTER_STEPS = "the run is at its end, which is completed first"


class EvaluationAbandoned(BaseException):
    """Leaves an evaluation that a signal interrupted. No `Exception`, so that code tolerating failed metrics passes it
    on."""


class InterruptedByUser(SystemExit, KeyboardInterrupt):
    """Ctrl-C, once the checkpoint is written: exits with a code when it is not caught, and is still caught by `except
    KeyboardInterrupt`."""


class Interrupt:
    """Catches signals while it is entered; `asked` becomes True when the run shall stop after the current step.

    In a run with one process the handler sets `asked`. Several ranks receive a signal at different moments, so there
    `asked` becomes True in `end_agreement`, after the same step on each. One line is written to stderr: by the handler
    of the first rank, or by that rank after the agreement: what the signal leads to (`what_follows`), and at the end
    what came of it (`outcome`). A second SIGINT raises KeyboardInterrupt at once.

    Signals are caught in the main thread only, since Python allows no handlers elsewhere; a signal that the program
    ignores (as under nohup) stays ignored. Leaving restores the earlier handlers and, after a signal, ends the process:
    first a callback's handler (`put_on_top`) and then the program's is called, late but with the checkpoint on disk,
    then SystemExit is raised with `exit_code`, or 128 plus the signal's number.
    """

    def __init__(
        self,
        names: tuple[str, ...] = (),
        exit_code: int | None = None,
        agreement: Any = None,
        *,
        is_main: bool = True,
        requeues: bool = False,
    ) -> None:
        self.asked = False
        self.in_evaluation = False  # whether `leave_evaluation` may be called
        self.exit_code = exit_code
        self.what_follows = BEFORE_STEPS
        self.outcome = ""  # which checkpoint there is, and how to resume; set by the loop once it is known
        self._names, self._agreement, self._is_main, self._requeues = names, agreement, is_main, requeues
        self._signal = 0  # the signal that this rank received, or that all agreed on
        self._had_sigint = self._has_said = False
        self._previous: dict[int, Any] = {}
        self._of_callbacks: dict[int, Any] = {}
        self._pid = os.getpid()
        self._has_ended = False

    @classmethod
    def for_run(cls, args: Any, is_distributed: bool) -> Interrupt:
        """From `args` (TrainingArguments). A collective in a distributed run.

        Raises ValueError for `save_on_exception` with several processes.
        """
        if is_distributed and args.save_on_exception:
            raise ValueError(
                "save_on_exception=True needs a run with one process: when one of several fails, the others wait "
                "for it inside an exchange and cannot take part in a checkpoint. Leave it out: save_steps bounds what "
                "is lost."
            )
        names = SIGNALS if args.save_on_signal else ("SIGTERM",) if args.enable_jit_checkpoint else ()
        agreement = None
        if names and is_distributed:
            from trainwright.parallel.signal_agreement import SignalAgreement

            agreement = SignalAgreement.of_group(args.ddp_timeout_delta)
        is_main = args.process_index == 0
        return cls(names, args.exit_code_on_signal, agreement, is_main=is_main, requeues=args.requeue_on_signal)

    # -- while training ------------------------------------------------------------------------------------------------

    def start_agreement(self) -> None:
        """Tell the other ranks of a signal, where there is one. Called before the last micro-batch of an update, whose
        exchange of gradients no rank can pass without this one.
        """
        if self._agreement is not None:
            self._agreement.start(self._signal)

    def end_agreement(self) -> None:
        """Called after the update. Afterwards `asked` and the signal are the same on all ranks."""
        if self._agreement is None:
            return
        agreed = self._agreement.result()
        if agreed and not self.asked:
            self._signal, self.asked = agreed, True
            if self._is_main and not self._has_said:
                self._say(f"{signal.Signals(agreed).name} received by another process")

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Context of an evaluation that may be abandoned: one that the loop makes between two steps."""
        if self.asked:
            raise EvaluationAbandoned
        self.in_evaluation = True
        try:
            yield
        finally:
            self.in_evaluation = False

    def leave_evaluation(self) -> None:
        """Raise EvaluationAbandoned after a signal. Called after each batch, by all ranks."""
        self.start_agreement()
        self.end_agreement()
        if self.asked:
            raise EvaluationAbandoned

    # -- handlers ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for name in self._names:
                number = getattr(signal, name, None)
                # None: a handler that was not installed from Python and could not be restored.
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._note)
            hold_alone(self)
        return self

    def put_on_top(self) -> None:
        """Reinstall the handlers that a callback replaced, as CodeCarbon does, whose handler ends the process at once.
        Called after the event in which trackers start.
        """
        for number in self._previous:
            handler = signal.getsignal(number)
            if handler not in (self._note, signal.SIG_IGN, None):
                self._of_callbacks[number] = handler
                signal.signal(number, self._note)

    def let_go(self) -> None:
        """In a fork: restore the program's handlers; a process that ignores signals could not be ended."""
        if self._has_ended:  # the handlers there now are the program's
            return
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # In a fork not made by Python; or called after the run by a handler that stored it as its predecessor.
        if os.getpid() != self._pid or self._has_ended:
            return
        if number == signal.SIGINT:
            if self._had_sigint:
                raise KeyboardInterrupt
            self._had_sigint = True
        if not self.asked:
            self._signal = int(number)
            self.asked = self._agreement is None
        if self._is_main:
            again = " Again: stops at once." if number == signal.SIGINT else ""
            self._say(f"{signal.Signals(number).name} received", again)

    def _say(self, what: str, again: str = "") -> None:
        self._has_said = True
        # Bars, and the "^C" of the terminal, give way to the message, and are drawn again below it.
        _write_now(
            (ERASE_DRAWN if can_erase(sys.__stderr__) else "\n") + f"trainwright: {what}; {self.what_follows}.{again}\n"
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self._has_ended = True
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        if self._agreement is not None:
            self._agreement.close()
        if error is None and self._signal:
            self._leave_process(self._of_callbacks.get(self._signal), self._previous.get(self._signal))

    def _leave_process(self, of_callback: Any, previous: Any) -> None:
        if self.outcome and self._is_main:
            _write_now(f"trainwright: {self.outcome}\n")
        if self._requeues and self._is_main and self._signal == getattr(signal, "SIGUSR1", None):
            requeue()
        if callable(of_callback):
            with contextlib.suppress(SystemExit):  # the exit code is that of the run
                of_callback(self._signal, None)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(self._signal, None)
        code = 128 + self._signal if self.exit_code is None else self.exit_code
        if self._signal != signal.SIGINT:
            raise SystemExit(code)
        if hasattr(sys, "ps1"):  # an interactive session, which continues
            raise KeyboardInterrupt
        raise InterruptedByUser(code)


def _write_now(text: str) -> None:
    """Write to stderr past Python's buffers, which a signal handler may have interrupted."""
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(2, text.encode())


@contextlib.contextmanager
def same_handlers() -> Iterator[None]:
    """Context of a library's call that may replace signal handlers: they are put back."""
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                # None: a handler that was not installed from Python.
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


def requeue() -> None:
    """Put the Slurm job of this process back into its queue. Slurm then ends this life of the job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        logger.warning("requeue_on_signal=True, but this is no Slurm job (SLURM_JOB_ID is not set).")
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        logger.error("The checkpoint is written, but Slurm did not requeue job %s: %s", job, problem)
    else:
        logger.warning("Slurm requeues job %s, whose next life resumes from the checkpoint.", job)


def owed_evaluation(stateful_callbacks: dict[str, Any]) -> bool:
    """Whether the run that wrote these states (`TrainerState.stateful_callbacks`) had to abandon an evaluation.

    The resumed run makes it first, so that best model, early stopping and log history are those of a run without a
    signal.
    """
    control = stateful_callbacks.get("TrainerControl") or {}
    return bool(control.get("args", {}).get("should_evaluate"))


def rescue(error: Exception, save: Callable[[], None], *, step: int, is_saved: bool, is_between_steps: bool) -> None:
    """Save after an exception, where that is possible, and log where a resume will start.

    `is_saved`: there is a checkpoint of `step` or there was no new step. `is_between_steps`: weights, optimizer, RNG
    states and position in the data are all those of the end of `step`.
    """
    what = f"The run failed after step {step} with {type(error).__name__}"
    if is_saved:
        logger.error("%s; nothing was done since the last checkpoint, so nothing is lost.", what)
    elif not is_between_steps:
        logger.error(
            "%s, in the middle of the next step: random state and position in the data belong to no step, so that no "
            "checkpoint can be written (save_on_exception). The last one is as it was.",
            what,
        )
    else:
        try:
            save()
        except Exception as second:
            logger.error("%s, and its state could not be saved either: %s: %s", what, type(second).__name__, second)
        else:
            logger.error("%s; a checkpoint of step %s was written.", what, step)
