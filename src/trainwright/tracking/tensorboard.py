"""TensorBoard event files.

Owns: `TensorBoardCallback` and where its files go: `TENSORBOARD_LOGGING_DIR`, else `args.logging_dir`, else
`<output_dir>/runs/<time>_<host>`; in a search one directory per trial below that. Leaves to others: viewing them.
Source: seed 000.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime
from typing import TYPE_CHECKING, Any

from trainwright.interop.optional import is_installed
from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, arguments_of, model_config_of

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments


class TensorBoardCallback(TrackerCallback):
    """Send log lines to TensorBoard.

    Args:
        tb_writer: a `SummaryWriter` to use; one is made when it is left out.
    """

    tracker_name = "tensorboard"

    def __init__(self, tb_writer: Any = None) -> None:
        super().__init__()
        self.tb_writer = tb_writer
        self._log_dir: str | None = None

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        self._log_dir = log_directory(args)
        if state.trial_name:
            self._log_dir = os.path.join(self._log_dir, state.trial_name)
        if self.tb_writer is None:
            self.tb_writer = summary_writer(self._log_dir)
            self._owns_run = True
        self.tb_writer.add_text("args", _as_markdown(arguments_of(args, sanitized=False)))
        if config := model_config_of(model):
            self.tb_writer.add_text("model_config", _as_markdown(config))

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        for name, value in metrics.items():
            self.tb_writer.add_scalar(name, value, state.global_step)
        self.tb_writer.flush()

    def end(self, status: Status) -> None:
        writer, self.tb_writer = self.tb_writer, None
        writer.close()


def summary_writer(log_dir: str | None) -> Any:
    """A writer of torch's own interface to tensorboard, or of tensorboardX where only that is installed."""
    if is_installed("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    else:
        from tensorboardX import SummaryWriter  # type: ignore[no-redef]
    return SummaryWriter(log_dir=log_dir)  # type: ignore[no-untyped-call]


def log_directory(args: TrainingArguments) -> str:
    """The directory that event files go to."""
    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR") or getattr(args, "logging_dir", None)
    if chosen:
        return str(chosen)
    return os.path.join(str(args.output_dir), "runs", f"{datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}")


def _as_markdown(values: dict[str, Any]) -> str:
    """Indented JSON as a code block: TensorBoard renders text as Markdown and would join the lines."""
    text = json.dumps(values, indent=2, sort_keys=True, default=str)
    return "\n".join(f"    {line}" for line in text.splitlines())
