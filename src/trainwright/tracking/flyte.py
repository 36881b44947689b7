"""Flyte.

Owns: `FlyteCallback`. Leaves to others: resuming (`train(resume_from_checkpoint=checkpoint.restore())`). Source: seed
000.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments


class FlyteCallback(TrackerCallback):
    """Sync checkpoints with Flyte and show the log history as a Deck. Works within a Flyte task only.

    Args:
        save_log_history: show the log lines as a Deck of the task when training ends, in whichever way.
        sync_checkpoints: hand every checkpoint to Flyte, from where an interrupted task resumes.
    """

    tracker_name = "flyte"
    stays_open = False
    end_limit_s = None  # the Decks of a task are those of its thread

    def __init__(self, save_log_history: bool = True, sync_checkpoints: bool = True) -> None:
        super().__init__()
        self.save_log_history = save_log_history
        self.sync_checkpoints = sync_checkpoints
        self._checkpoint: Any = None
        self._state: TrainerState | None = None

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        if self.sync_checkpoints:
            from flytekit import current_context

            try:
                self._checkpoint = current_context().checkpoint
            except NotImplementedError as error:
                raise RuntimeError(
                    "there is no Flyte checkpoint here: FlyteCallback works within a Flyte task only; "
                    "outside of one pass sync_checkpoints=False"
                ) from error
        self._state, self._owns_run = state, True

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """No-op: the history is shown when training ends."""

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        """No-op, as `on_log`."""

    def log_checkpoint(self, directory: Path, args: TrainingArguments, state: TrainerState) -> None:
        if self._checkpoint is not None:
            self._checkpoint.save(str(directory))

    def end(self, status: Status) -> None:
        state, self._state = self._state, None
        if self.save_log_history and state is not None:
            from flytekit import Deck

            Deck("Log History", log_history_table(state.log_history))


def log_history_table(log_history: list[dict[str, Any]]) -> str:
    """The log lines as an HTML table with a column per name, in the order in which names first occur."""
    names = list(dict.fromkeys(name for line in log_history for name in line))
    rows = [[html.escape(str(line.get(name, ""))) for name in names] for line in log_history]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
