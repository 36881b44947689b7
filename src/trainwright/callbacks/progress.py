"""Progress in a terminal: a bar for training and for prediction, or log lines alone.

Owns: how steps, epoch, loss, speed and remaining time look in a terminal. Leaves to others: notebooks (`notebook`).
A step costs one call into tqdm, which draws at most ten times a second, or writes a line now and then where the output
is no terminal.
Source: seed 000 (the classes, `max_str_len`), seed 003 (which events they use).
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from trainwright.callbacks.base import TrainerCallback
from trainwright.state import TrainerControl, TrainerState

LINE_INTERVAL_S = 30  # between two lines of a bar that is written to a file or a pipe


class ProgressCallback(TrainerCallback):
    """A bar for training, one for prediction, and log lines above them; on the first process only.

    `max_str_len`: characters after which a text in a log line is cut.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        if not isinstance(max_str_len, int) or max_str_len < 1:
            raise ValueError(f"max_str_len must be a number of characters of at least 1, not {max_str_len!r}.")
        self.max_str_len = max_str_len
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        self._last_losses: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._close_bars()  # a run that an exception ended leaves its bar open
            self._last_losses = {}
            # Started at the resumed step, so that speed and remaining time count this run's steps only.
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", desc=_epoch_text(state), **_drawing()
            )

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.set_description(_epoch_text(state), refresh=False)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        bar = self.training_bar
        if bar is not None:
            bar.update(state.global_step - bar.n)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        self._close_prediction_bar()  # what it measured is being logged
        for name in ("loss", "eval_loss"):
            if isinstance(logs.get(name), (int, float)):
                self._last_losses[name] = f"{logs[name]:.4g}"
        self.training_bar.set_postfix(self._last_losses, refresh=False)
        self.training_bar.write(str(readable_logs(logs, self.max_str_len)))
        sys.stdout.flush()  # output to a file is buffered

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.prediction_bar is None:
            self.prediction_bar = tqdm(
                total=length_of(eval_dataloader),
                unit="batch",
                desc="Evaluating",
                leave=self.training_bar is None,
                **_drawing(first_line_after_s=LINE_INTERVAL_S),
            )
        self.prediction_bar.update(1)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._close_prediction_bar()

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._close_prediction_bar()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close_bars()

    def _close_prediction_bar(self) -> None:
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None

    def _close_bars(self) -> None:
        self._close_prediction_bar()
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


def _epoch_text(state: TrainerState) -> str:
    total = total_epochs_text(state)
    epoch = int(state.epoch or 0) + 1
    # A run that is resumed at its end begins no other epoch.
    return f"Epoch {min(epoch, state.num_train_epochs) if total else epoch}{total}"
