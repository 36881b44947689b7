"""Progress in a notebook: a bar, and a table with one row per evaluation or log line.

Owns: a run as HTML in a notebook cell, and the choice between notebook and terminal. Leaves to others: terminals
(`progress`), reports on disk (`report/html`). Everything is rendered to a string (`html_code`), so that it works
without a notebook; IPython is imported when something is first shown.
Source: seed 001 (`disable_tqdm` names the table), seed 003 (which events it uses).
"""

from __future__ import annotations

import functools
import html
import sys
import time
from collections.abc import Callable
from typing import Any

from trainwright.callbacks.base import TrainerCallback
from trainwright.callbacks.progress import (
    PrinterCallback,
    ProgressBase,
    ProgressCallback,
    RunDurations,
    knows_epoch,
    length_of,
    total_epochs_text,
)
from trainwright.interop.optional import require
from trainwright.names import IntervalStrategy
from trainwright.state import TrainerControl, TrainerState

# What an evaluation reports about itself; a table of results is easier to read without them.
UNSHOWN_SUFFIXES = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")
UNSHOWN_NAMES = ("epoch", "total_flos")


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, which shows HTML. False in a terminal, IPython's included."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def format_time(duration_s: float) -> str:
    """
    >>> format_time(5), format_time(3700)
    ('00:05', '1:01:40')
    """
    minutes, seconds = divmod(int(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def default_progress(disable_tqdm: bool) -> type[TrainerCallback]:
    """The default progress callback: printed lines, a table in a notebook, else bars."""
    if disable_tqdm:
        return PrinterCallback
    return NotebookProgressCallback if in_notebook() else ProgressCallback


class NotebookProgressBar:
    """A bar in a notebook cell.

    total: value at which it is full; None where it is unknown. prefix: text before the numbers. leave: keep it after
    `close()`. parent: the tracker that shows this bar below its table. width: pixels.
    """

    update_every = 0.2  # seconds between two drawings; a cell that changes more often makes the browser slow

    def __init__(
        self,
        total: int | None,
        prefix: str | None = None,
        leave: bool = True,
        parent: NotebookTrainingTracker | None = None,
        width: int = 300,
    ) -> None:
        self.total = total
        self.prefix = prefix or ""
        self.leave = leave
        self.parent = parent
        self.width = width
        self.value = 0
        self.comment = ""
        self._first_value = 0
        self._start_s: float | None = None
        self._elapsed_s = 0.0
        self._drawn_s = 0.0
        self.left_text: Callable[[], str] | None = None  # the remaining time; None: at the speed so far
        self._output: Any = None

    def update(self, value: int, force_update: bool = False, comment: str | None = None) -> None:
        """Move to `value`, and draw when it is the first or the last one, enough time has passed, or when forced."""
        now_s = time.perf_counter()
        self.value = value
        self.comment = self.comment if comment is None else comment
        is_first = self._start_s is None
        if self._start_s is None:
            self._start_s, self._first_value = now_s, value
        self._elapsed_s = now_s - self._start_s
        is_due = now_s - self._drawn_s >= self.update_every
        if force_update or is_first or is_due or (self.total is not None and value >= self.total):
            self._drawn_s = now_s
            self.display()

    @property
    def label(self) -> str:
        """ "[30/100 00:03 < 00:07, 10.00 it/s, Epoch 0.30/1]"."""
        text = f"{self.value}/{self.total}" if self.total else f"{self.value}"
        num_done = self.value - self._first_value
        text += f" {format_time(self._elapsed_s)}"
        if num_done > 0 and self._elapsed_s > 0:
            per_s = num_done / self._elapsed_s
            if self.left_text is not None:
                text += f" < {self.left_text()}"
            elif self.total:
                text += f" < {format_time(max(self.total - self.value, 0) / per_s)}"
            text += f", {per_s:.2f} it/s" if per_s >= 1 else f", {1 / per_s:.2f} s/it"
        return f"[{text}{', ' if self.comment else ''}{self.comment}]"

    @property
    def html_code(self) -> str:
        value = f'value="{self.value}" max="{self.total}"' if self.total else ""  # neither: the browser shows activity
        bar = f'<progress {value} style="width: {self.width}px; height: 20px; vertical-align: middle"></progress>'
        return f"<div>{html.escape(self.prefix)} {bar} {html.escape(self.label)}</div>"

    def display(self) -> None:
        """Show the current state, in the cell's one output area."""
        if self.parent is not None:
            self.parent.display()
            return
        self._show(self.html_code)

    def close(self) -> None:
        """Remove the bar, unless it was made with `leave`."""
        if not self.leave and self._output is not None:
            self._show("")

    def _show(self, html_code: str) -> None:
        shown = require("IPython.display", "Progress in a notebook", package="ipython", extra="notebook")
        if self._output is None:
            self._output = shown.display(shown.HTML(html_code), display_id=True)
        else:
            self._output.update(shown.HTML(html_code))


class NotebookTrainingTracker(NotebookProgressBar):
    """A bar for training with a table below it, and below that, during an evaluation, a second bar.

    num_steps: updates of the run. column_names: of the table; a value of a later row may add one.
    """

    def __init__(self, num_steps: int | None, column_names: list[str] | None = None) -> None:
        super().__init__(num_steps)
        # The header, then one row per line; None until there are columns.
        self.inner_table: list[list[Any]] | None = None if column_names is None else [list(column_names)]
        self.child_bar: NotebookProgressBar | None = None

    @property
    def html_code(self) -> str:
        table = table_html(self.inner_table) if self.inner_table else ""
        return super().html_code + table + (self.child_bar.html_code if self.child_bar is not None else "")

    def write_line(self, values: dict[str, Any]) -> None:
        """Add a row with `values` by column name, or complete the last row where the first column is the same."""
        if self.inner_table is None:
            self.inner_table = [list(values)]
        header, *rows = self.inner_table
        for name in values:
            if name not in header:
                header.append(name)
                for row in rows:
                    row.append("")
        if rows and rows[-1][0] == values.get(header[0]):
            rows[-1][:] = [values.get(name, present) for name, present in zip(header, rows[-1])]
        else:
            self.inner_table.append([values.get(name, "") for name in header])

    def add_child(self, total: int | None, prefix: str | None = None, width: int = 300) -> NotebookProgressBar:
        """Show a second bar below the table and return it."""
        self.child_bar = NotebookProgressBar(total, prefix=prefix, parent=self, width=width)
        return self.child_bar

    def remove_child(self) -> None:
        """Remove the second bar."""
        self.child_bar = None
        self.display()


class NotebookProgressCallback(ProgressBase):
    """Shows a run in a notebook: progress, and a table of training loss, validation loss and metrics."""

    def __init__(self) -> None:
        self.training_tracker: NotebookTrainingTracker | None = None
        self.prediction_bar: NotebookProgressBar | None = None
        self.first_column = "Step"
        self._training_loss: Any = "No log"

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.first_column = "Epoch" if args.eval_strategy == IntervalStrategy.EPOCH else "Step"
        self._training_loss = "No log"
        columns = [self.first_column, "Training Loss"]
        if args.eval_strategy != IntervalStrategy.NO:
            columns.append("Validation Loss")
        self.prediction_bar = None
        self.training_tracker = NotebookTrainingTracker(state.max_steps, columns)
        self.durations = RunDurations(args, state)
        self.training_tracker.left_text = functools.partial(self.durations.left_text, format_time)
        self.training_tracker.update(state.global_step, comment=_epoch_text(state))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_tracker is not None and self.durations is not None:
            if self.durations.first_step is None:
                self.durations.begin()
            if control.should_evaluate or control.should_save:
                self.durations.pause()
            self.training_tracker.update(state.global_step, comment=_epoch_text(state))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if self.training_tracker is None or not logs or "loss" not in logs:
            return
        self._training_loss = logs["loss"]
        if args.eval_strategy == IntervalStrategy.NO:  # else a row per evaluation, with the training loss of that time
            self.training_tracker.write_line({"Step": state.global_step, "Training Loss": self._training_loss})
            self.training_tracker.display()

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.prediction_bar is None:
            total = length_of(eval_dataloader)
            if self.durations is not None:
                self.durations.pause()
            if self.training_tracker is not None:
                self.prediction_bar = self.training_tracker.add_child(total, prefix=self.prediction_name)
            else:
                self.prediction_bar = NotebookProgressBar(total, prefix=self.prediction_name)
        self.prediction_bar.update(self.prediction_bar.value + 1)

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._close_prediction_bar()

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._close_prediction_bar()
        if self.durations is not None:
            self.durations.evaluated()
        if self.training_tracker is None:
            return
        position = state.global_step if self.first_column == "Step" else round(state.epoch or 0.0, 2)
        row = {self.first_column: position, "Training Loss": self._training_loss}
        row.update({column_name(name): value for name, value in (metrics or {}).items() if _is_shown(name)})
        self.training_tracker.write_line(row)
        self.training_tracker.display()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_tracker is not None:
            self.training_tracker.update(state.global_step, force_update=True, comment=_epoch_text(state))
        self.training_tracker = self.durations = None

    def abandon(self, *, training: bool) -> None:
        self._close_prediction_bar()
        if training:
            if self.training_tracker is not None:
                self.training_tracker.display()  # with the step that it came to, not the one last drawn
            self.training_tracker = self.durations = None

    def _close_prediction_bar(self) -> None:
        if self.prediction_bar is not None:
            if self.training_tracker is not None:
                self.training_tracker.remove_child()
            else:
                self.prediction_bar.close()
            self.prediction_bar = None


def column_name(metric: str) -> str:
    """
    >>> column_name("eval_loss"), column_name("eval_accuracy"), column_name("eval_dev_f1")
    ('Validation Loss', 'Accuracy', 'Dev F1')
    """
    name = metric.removeprefix("eval_").replace("_", " ").title()
    return "Validation Loss" if name == "Loss" else name


def table_html(rows: list[list[Any]]) -> str:
    """An HTML table whose first row is the header; floats get six decimals."""
    header = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell_text(cell))}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f'<table class="dataframe"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>'


def _cell_text(cell: Any) -> str:
    return f"{cell:.6f}" if isinstance(cell, float) else str(cell)


def _is_shown(metric: str) -> bool:
    return metric not in UNSHOWN_NAMES and not metric.endswith(UNSHOWN_SUFFIXES)


def _epoch_text(state: TrainerState) -> str:
    return f"Epoch {state.epoch or 0.0:.2f}{total_epochs_text(state)}" if knows_epoch(state) else ""
