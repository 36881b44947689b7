"""ClearML.

Owns: `ClearMLCallback` and the variables in its docstring. Leaves to others: all other CLEARML_* variables, which the
package reads itself. Source: seed 000.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.interop.environment import env_flag
from trainwright.state import TrainerState
from trainwright.tracking.base import TOTALS, Status, TrackerCallback, arguments_of, model_config_of, run_name_of

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)


class ClearMLCallback(TrackerCallback):
    """Send log lines, settings and, on request, checkpoints to a ClearML task.

    A task that exists already (`Task.init()` was called) is used and never closed here.

    Environment:
        CLEARML_PROJECT: project, "HuggingFace Transformers" by default.
        CLEARML_TASK: task, "Trainer" by default.
        CLEARML_LOG_MODEL: true uploads every checkpoint as a model of the task; needs a server.
    """

    tracker_name = "clearml"

    def __init__(self) -> None:
        super().__init__()
        self._clearml: Any = None
        self._clearml_task: Any = None
        self._log_model = env_flag("CLEARML_LOG_MODEL")

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import clearml

        self._clearml = clearml
        if self._log_model and clearml.Task.is_offline():
            logger.warning("CLEARML_LOG_MODEL has no effect offline: ClearML keeps models on its server only.")
            self._log_model = False
        self._clearml_task = clearml.Task.current_task()
        if self._clearml_task is None:
            self._clearml_task = clearml.Task.init(
                project_name=os.environ.get("CLEARML_PROJECT", "HuggingFace Transformers"),
                task_name=os.environ.get("CLEARML_TASK") or state.trial_name or "Trainer",
                reuse_last_task_id=False,
                # What these would catch by patching is sent here on purpose, once.
                auto_connect_frameworks={"tensorboard": False, "pytorch": False},
                output_uri=True if self._log_model else None,
            )
            self._owns_run = True
        if name := run_name_of(args, state):
            self._clearml_task.set_comment(name)
        self._clearml_task.connect(
            {**arguments_of(args, sanitized=False), **(state.trial_params or {})}, name="Transformers"
        )
        if config := model_config_of(model):
            self._clearml_task.connect_configuration(config, name="Model Configuration")

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        report = self._clearml_task.get_logger()
        for name, value in metrics.items():
            group, _, series = name.partition("/")
            if group == "train" and (series in TOTALS or series == "epoch"):
                report.report_single_value(name=series, value=value)
            else:
                report.report_scalar(title=group, series=series, value=value, iteration=state.global_step)

    def log_checkpoint(self, directory: Path, args: TrainingArguments, state: TrainerState) -> None:
        if self._log_model:
            output = self._clearml.OutputModel(task=self._clearml_task, name=directory.name, framework="PyTorch")
            output.update_weights_package(
                weights_path=str(directory), target_filename=directory.name, iteration=state.global_step,
                auto_delete_file=False,
            )  # fmt: skip

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        self._clearml_task.flush(wait_for_uploads=True)

    def end(self, status: Status) -> None:
        if status != "finished":
            self._clearml_task.mark_failed(status_reason=status)
        self._clearml_task.close()
