"""TensorBoard event files.

Owns: `TensorBoardCallback` and where its files go: `TENSORBOARD_LOGGING_DIR`, else `args.logging_dir`, else
`<output_dir>/runs/<time>_<host>`; below that one directory per trial of a search. A directory is one run to
TensorBoard, so a further training in the same process has a new directory, with a number, and a resumed one that
of before. Leaves to others: viewing them. Source: seed 000.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.interop.optional import is_installed
from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, arguments_of, model_config_of, run_name_of

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments


class TensorBoardCallback(TrackerCallback):
    """Send log lines to TensorBoard.

    Args:
        tb_writer: a `SummaryWriter` to use; one is made when it is left out.
    """

    tracker_name = "tensorboard"
    replaces_points = True

    def __init__(self, tb_writer: Any = None) -> None:
        super().__init__()
        self.tb_writer = tb_writer
        self._log_dir: str | None = None

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        if self.tb_writer is None:
            self._log_dir = self._directory(args, state)
            # What an earlier life of a resumed training wrote after its last checkpoint is not shown.
            purge_step = state.global_step + 1 if self._resume_id and self._is_training else None
            self.tb_writer = summary_writer(self._log_dir, purge_step)
            self._owns_run = True
        self.tb_writer.add_text("args", _as_markdown(arguments_of(args, sanitized=False)))
        if config := model_config_of(model):
            self.tb_writer.add_text("model_config", _as_markdown(config))

    def _directory(self, args: TrainingArguments, state: TrainerState) -> str:
        directory = log_directory(args)
        if self._resume_id is not None:
            earlier, numbered = Path(self._resume_id).resolve(), str(Path(directory).resolve())
            # What says where it was may be another's file: nothing is written outside the places of this training.
            is_ours = earlier.is_relative_to(Path(str(args.output_dir)).resolve()) or str(earlier).startswith(numbered)
            if is_ours and earlier.is_dir():
                return str(earlier)
        if state.is_hyper_param_search:
            directory = os.path.join(directory, run_name_of(args, state) or "trial")
        number = 2
        chosen = directory
        while os.path.abspath(chosen) in _used:
            chosen, number = f"{directory}-{number}", number + 1
        _used.add(os.path.abspath(chosen))
        return chosen

    def run_id(self) -> str | None:
        return os.path.abspath(self._log_dir) if self._log_dir is not None else None

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        for name, value in metrics.items():
            self.tb_writer.add_scalar(name, value, state.global_step)
        self.tb_writer.flush()

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        self.tb_writer.flush()

    def end(self, status: Status) -> None:
        writer, self.tb_writer = self.tb_writer, None
        writer.close()


_used: set[str] = set()  # directories that runs of this process have


def summary_writer(log_dir: str | None, purge_step: int | None = None) -> Any:
    """A writer of torch's own interface to tensorboard, or of tensorboardX where only that is installed."""
    if is_installed("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    else:
        from tensorboardX import SummaryWriter  # type: ignore[no-redef]
    return SummaryWriter(log_dir=log_dir, purge_step=purge_step)  # type: ignore[no-untyped-call]


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
