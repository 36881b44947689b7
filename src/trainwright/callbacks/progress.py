"""Progress in a terminal: a bar for training and for prediction, and log lines above it, or log lines alone.

Owns: how steps, epoch, loss, speed and remaining time look in a terminal, and what both kinds of progress share
(`ProgressBase`): the durations that the remaining time is estimated from, the word for a prediction, and closing what
an exception left open. Leaves to others: notebooks (`notebook`), the layout of a log line in a terminal (`log_lines`),
when the run evaluates and saves (`flow`).
A step costs one call into tqdm, which draws at most ten times a second, or writes a line now and then where the output
is no terminal.
Source: seed 000 (the classes, `max_str_len`), seed 003 (which events they use).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from trainwright.callbacks.base import TrainerCallback
from trainwright.callbacks.flow import scheduled
from trainwright.log_output import ERASE_DRAWN, can_erase
from trainwright.state import TrainerControl, TrainerState

LINE_INTERVAL_S = 30  # between two lines of a bar that is written to a file or a pipe
ECHO_WIDTH = 3  # columns left free: a terminal echoes Ctrl-C as "^C", which must not run over into the next line
POSTFIX_WIDTH = 100  # columns below which the last losses would leave no room for the bar
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"


class RunDurations:
    """How long steps, evaluations and saves of a run took, and from that how long the rest of it takes.

    Steps are timed from the end of the first one on, which also builds and compiles. What a background writer does
    (`async_save`) delays no step, and is not timed. `clock`: gives seconds.
    """

    def __init__(self, args: Any, state: TrainerState, clock: Callable[[], float] = time.perf_counter) -> None:
        self.args, self.state, self._clock = args, state, clock
        self._times_saves = not getattr(args, "async_save", False)
        self.first_step: int | None = None  # at whose end the measurement of steps began
        self._began_s = 0.0
        self._since_s = 0.0  # of `paused_step`: when its evaluation or save began
        self.paused_step: int | None = None
        self._evaluated_step: int | None = None
        self._apart_s = 0.0  # evaluations and saves since the measurement began
        self._evaluations_s = self._saves_s = 0.0
        self.num_evaluations = self.num_saves = 0

    def begin(self) -> None:
        """The first step is done."""
        self.first_step, self._began_s = self.state.global_step, self._clock()

    def pause(self) -> None:
        """What follows the step begins. Called again within the same step it changes nothing."""
        if self.paused_step != self.state.global_step:
            self.paused_step, self._since_s = self.state.global_step, self._clock()

    def evaluated(self) -> None:
        """An evaluation is over; those of several data sets after one step count as one."""
        duration_s = self._since_pause()
        if duration_s is None:
            return
        self._evaluations_s += duration_s
        self.num_evaluations += self._evaluated_step != self.state.global_step
        self._evaluated_step = self.state.global_step

    def saved(self) -> None:
        """A checkpoint is on the disk."""
        duration_s = self._since_pause() if self._times_saves else None
        if duration_s is not None:
            self._saves_s += duration_s
            self.num_saves += 1

    def _since_pause(self) -> float | None:
        if self.paused_step != self.state.global_step:
            return None
        now_s = self._clock()
        duration_s, self._since_s = now_s - self._since_s, now_s
        if self.first_step is not None:
            self._apart_s += duration_s
        return duration_s

    @property
    def step_s(self) -> float | None:
        """Mean duration of a step, in seconds, without evaluations and saves; None before there were two."""
        step = self.state.global_step
        if self.first_step is None or step <= self.first_step:
            return None
        now_s = self._since_s if self.paused_step == step else self._clock()
        return max(now_s - self._began_s - self._apart_s, 0.0) / (step - self.first_step)

    def left(self) -> tuple[float | None, bool]:
        """(seconds until the end of the run, whether evaluations or saves are to come that were not timed yet)."""
        step_s = self.step_s
        if step_s is None:
            return None, False
        evaluations, foreseen = scheduled(self.args, self.state)
        saves: float = foreseen or 0
        if foreseen is None:  # those of `save_strategy="best"` follow a share of the evaluations
            saves = evaluations * self.num_saves / self.num_evaluations if self.num_evaluations else 0
        if not self._times_saves:
            saves = 0
        left_s = (self.state.max_steps - self.state.global_step) * step_s
        if self.num_evaluations:
            left_s += evaluations * self._evaluations_s / self.num_evaluations
        if self.num_saves:
            left_s += saves * self._saves_s / self.num_saves
        return left_s, (evaluations > 0 and not self.num_evaluations) or (saves > 0 and not self.num_saves)

    def left_text(self, format_time: Callable[[float], str]) -> str:
        """`left` as text: "?", "12:05", or "12:05+" where something was not timed yet."""
        left_s, is_more = self.left()
        return "?" if left_s is None else format_time(left_s) + "+" * is_more


class ProgressBase(TrainerCallback):
    """What progress in a terminal and in a notebook share. `durations`: of the run under way."""

    prediction_name = "Evaluating"  # or "Predicting": what the batches of `on_prediction_step` are for
    durations: RunDurations | None = None

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.durations is not None and (control.should_evaluate or control.should_save):
            self.durations.pause()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.durations is not None:
            self.durations.saved()

    def abandon(self, *, training: bool) -> None:
        """Close what is shown of a prediction, and with `training` of the run: an exception ended it."""
        raise NotImplementedError


@contextlib.contextmanager
def nothing_left_open(callbacks: Sequence[Any], prediction: str | None = None) -> Iterator[None]:
    """Context of a training, or of a prediction of that description: what an exception leaves open is closed."""
    shown = [callback for callback in callbacks if isinstance(callback, ProgressBase)]
    for callback in shown if prediction is not None else ():
        callback.prediction_name = "Predicting" if prediction == "Prediction" else "Evaluating"
    try:
        yield
    except BaseException:
        for callback in shown:
            callback.abandon(training=prediction is None)
        raise


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar with room for the echo of Ctrl-C. `durations`: from which the remaining time and the speed are."""

    def __init__(self, *args: Any, durations: RunDurations | None = None, **kwargs: Any) -> None:
        self._durations = durations
        if durations is not None:
            kwargs["bar_format"] = BAR_FORMAT
        super().__init__(*args, **kwargs)

    @property
    def format_dict(self) -> dict[str, Any]:
        """Read once for each drawing."""
        values = dict(super().format_dict)
        if values["ncols"] is not None:
            if values["ncols"] < POSTFIX_WIDTH:
                values["postfix"] = None  # the log lines above have them
            values["ncols"] = max(values["ncols"] - ECHO_WIDTH, 1)
        if self._durations is not None:
            step_s = self._durations.step_s
            values["rate"] = 1 / step_s if step_s else None
            values["left"] = self._durations.left_text(tqdm.format_interval)
        return values


class ProgressCallback(ProgressBase):
    """A bar for training, one for prediction, and log lines above them; on the first process only.

    In a terminal, and wherever FORCE_COLOR is set, log lines are columns that fit the width. Elsewhere they are dicts,
    which programs parse, as those of `disable_tqdm=True` are everywhere.
    `max_str_len`: characters after which a text in a log line is cut.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        if not isinstance(max_str_len, int) or max_str_len < 1:
            raise ValueError(f"max_str_len must be a number of characters of at least 1, not {max_str_len!r}.")
        self.max_str_len = max_str_len
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        self._last_losses: dict[str, str] = {}
        self._forces_columns = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._close_bars()  # an attempt that is followed by another one leaves its bar open
            self._last_losses = {}
            self._forces_columns = bool(os.environ.get("FORCE_COLOR"))
            self.durations = RunDurations(args, state)
            # Started at the resumed step, so that speed and remaining time count this run's steps only.
            self.training_bar = _Bar(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                desc=_epoch_text(state),
                durations=self.durations,
                **_drawing(),
            )

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.set_description(_epoch_text(state), refresh=False)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        bar, durations = self.training_bar, self.durations
        if bar is not None and durations is not None:
            if durations.first_step is None:
                durations.begin()
            if control.should_evaluate or control.should_save:
                durations.pause()
            bar.update(state.global_step - bar.n)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        self._close_prediction_bar()  # what it measured is being logged
        for name in ("loss", "eval_loss"):
            if isinstance(logs.get(name), (int, float)):
                self._last_losses[name] = f"{logs[name]:.4g}"
        self.training_bar.set_postfix(self._last_losses, refresh=False)
        line = readable_logs(logs, self.max_str_len)
        if self._forces_columns or sys.stdout.isatty():
            from trainwright.callbacks import log_lines

            colour = log_lines.takes_colour(sys.stdout)
            self.training_bar.write(log_lines.log_line(line, state, log_lines.shown_width(), colour))
        else:
            self.training_bar.write(str(line))
        sys.stdout.flush()  # output to a file is buffered

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.prediction_bar is None:
            if self.durations is not None:
                self.durations.pause()
            self.prediction_bar = _Bar(
                total=length_of(eval_dataloader),
                unit="batch",
                desc=self.prediction_name,
                leave=self.training_bar is None,
                **_drawing(first_line_after_s=LINE_INTERVAL_S),
            )
        self.prediction_bar.update(1)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._close_prediction_bar()
        if self.durations is not None:
            self.durations.evaluated()

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._close_prediction_bar()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close_bars()

    def abandon(self, *, training: bool) -> None:
        bars = [bar for bar in (self.prediction_bar, self.training_bar if training else None) if bar is not None]
        if bars and can_erase(sys.stderr):
            sys.stderr.write(ERASE_DRAWN)  # with the "^C" of the terminal, which tqdm does not know of
        if training:
            self._close_bars()
        else:
            self._close_prediction_bar()

    def _close_prediction_bar(self) -> None:
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None

    def _close_bars(self) -> None:
        self._close_prediction_bar()
        self.durations = None
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class _Lines:
    """Gives each state of a bar a line of its own, for a file or a pipe, where nothing can be drawn over."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.strip():
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def _drawing(first_line_after_s: float = 0) -> dict[str, Any]:
    """Options of a bar: redrawn in place in a terminal, elsewhere a line of its own now and then."""
    if sys.stderr.isatty():
        return {"dynamic_ncols": True}
    rarely = {"mininterval": LINE_INTERVAL_S, "maxinterval": LINE_INTERVAL_S, "delay": first_line_after_s}
    return {"file": _Lines(sys.stderr), "position": 0, **rarely}


class PrinterCallback(TrainerCallback):
    """Prints log lines and nothing else; what a run shows with `disable_tqdm=True`."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if logs and state.is_local_process_zero:
            print(readable_logs(logs), flush=True)  # flushed, because output to a file or a scheduler's log is buffered


def readable_logs(logs: dict[str, Any], max_str_len: int | None = None) -> dict[str, Any]:
    """A copy of `logs` for people: six digits, long texts cut, and without the count of operations.

    >>> readable_logs({"loss": 0.123456789, "total_flos": 1e15, "note": "abcdef"}, max_str_len=3)
    {'loss': 0.123457, 'note': 'abc... (6 characters)'}
    """
    readable = {}
    for name, value in logs.items():
        if isinstance(value, float):
            value = float(f"{value:.6g}")
        elif isinstance(value, str) and max_str_len is not None and len(value) > max_str_len:
            value = f"{value[:max_str_len]}... ({len(value)} characters)"
        if name != "total_flos":
            readable[name] = value
    return readable


def total_epochs_text(state: TrainerState) -> str:
    """ "/3", or "" where `max_steps` alone decides when the run ends."""
    return f"/{state.num_train_epochs}" if 0 < state.num_train_epochs < sys.maxsize else ""


def length_of(dataloader: Any) -> int | None:
    """Batches in `dataloader`; None where it cannot tell (an iterable dataset)."""
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        return None


def knows_epoch(state: TrainerState) -> bool:
    """Whether `state.epoch` counts passes over the data. In the first pass over a stream it does not: nobody knows how
    long that is, and the epoch is the share of the run.
    """
    return state.num_train_epochs < sys.maxsize or (state.epoch or 0.0) > 1


def _epoch_text(state: TrainerState) -> str:
    total = total_epochs_text(state)
    if not total and int(state.epoch or 0) == 0:
        return "Training"
    epoch = int(state.epoch or 0) + 1
    # A run that is resumed at its end begins no other epoch.
    return f"Epoch {min(epoch, state.num_train_epochs) if total else epoch}{total}"
