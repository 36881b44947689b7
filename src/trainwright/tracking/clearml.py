"""ClearML.

Owns: `ClearMLCallback` and the variables in its docstring. Leaves to others: all other CLEARML_* variables, which the
package reads itself. Source: seed 000.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.interop.environment import env_flag
from trainwright.state import TrainerState
from trainwright.tracking.base import (
    TOTALS,
    Status,
    TrackerCallback,
    arguments_of,
    group_of,
    model_config_of,
    run_name_of,
    within,
)

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

UPLOAD_LIMIT_S = 300.0  # for the uploads of a training that came to its end
CLOSE_LIMIT_S = 60.0  # for the rest, in which ClearML (2.1.12) waits for threads without a limit


class ClearMLCallback(TrackerCallback):
    """Send log lines, settings and, on request, checkpoints to a ClearML task.

    A task that exists already (`Task.init()` was called) is used and never closed here; else each training has its own.
    NaN and infinity, which a curve would show as 0, go to the console of the task. An offline session has no status: a
    user property "status" says how the training ended.

    Environment:
        CLEARML_PROJECT: project, "HuggingFace Transformers" by default.
        CLEARML_TASK: task, "Trainer" by default.
        CLEARML_LOG_MODEL: true uploads every checkpoint, as a model of the task (offline: as an artifact). The user
            properties "checkpoint_last" and "checkpoint_best" name the two.
    """

    tracker_name = "clearml"
    end_limit_s = None  # signal handlers, which closing replaces, are the main thread's; it has its own limits here

    def __init__(self) -> None:
        super().__init__()
        self._clearml: Any = None
        self._clearml_task: Any = None
        self._log_model = env_flag("CLEARML_LOG_MODEL")
        self._handlers: dict[int, Any] = {}  # of signals, before ClearML put its own there

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import clearml

        self._clearml = clearml
        self._clearml_task = clearml.Task.current_task()
        if self._clearml_task is None:
            self._clearml_task = self._open(args, state)
            self._owns_run = True
        if self._resume_id is not None and self._resume_id == self.run_id():
            self._clearml_task.set_initial_iteration(0)  # else all steps are counted from the last one
            if not self._is_training:
                return
        if name := run_name_of(args, state):
            self._clearml_task.set_comment(name)
        self._connect({**arguments_of(args, sanitized=False), **(state.trial_params or {})})
        if config := model_config_of(model):
            self.optional(
                "the model's configuration",
                self._clearml_task.connect_configuration,
                config,
                name="Model Configuration",
            )

    def _open(self, args: TrainingArguments, state: TrainerState) -> Any:
        task = self._clearml.Task
        # Its reporter is else a process, forked among the threads of this one: flushing and closing then wait for
        # seconds, and in a second task of the process for ever (2.1.12). The variable for it has no effect.
        if hasattr(task, "_report_subprocess_enabled"):
            task._report_subprocess_enabled = False
        self._handlers = _handlers()
        group = group_of(args, state)
        name = os.environ.get("CLEARML_TASK")
        return task.init(
            project_name=os.environ.get("CLEARML_PROJECT", "HuggingFace Transformers"),
            task_name=name or (run_name_of(args, state) if state.is_hyper_param_search else None) or "Trainer",
            tags=[group] if group is not None else None,
            reuse_last_task_id=False,
            continue_last_task=self._resume_id or False,
            # What these would catch by patching is sent here on purpose, once.
            auto_connect_frameworks={"tensorboard": False, "pytorch": False},
            output_uri=True if self._log_model and not task.is_offline() else None,
        )

    def run_id(self) -> str | None:
        return str(self._clearml_task.id)

    def _connect(self, settings: dict[str, Any]) -> None:
        try:
            self._clearml_task.connect(settings, name="Transformers")
        except Exception:
            for name, value in settings.items():
                self.optional(name, self._clearml_task.connect, {name: value}, name="Transformers")

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        for name, value in metrics.items():
            self.optional(name, self._report, name, value, state.global_step)

    def _report(self, name: str, value: Any, step: int) -> None:
        report, value = self._clearml_task.get_logger(), float(value)
        group, _, series = name.partition("/")
        if not math.isfinite(value):
            report.report_text(f"{name} is {value} at step {step}")
            self.without(name, f"its curves have no place for {value}, which is on the console of the task instead")
        elif group == "train" and (series in TOTALS or series == "epoch"):
            report.report_single_value(name=series, value=value)
        else:
            report.report_scalar(title=group, series=series, value=value, iteration=step)

    def log_checkpoint(self, directory: Path, args: TrainingArguments, state: TrainerState) -> None:
        if not self._log_model:
            return
        task, name = self._clearml_task, directory.name
        if task.is_offline():  # where models have no place (2.1.12)
            task.upload_artifact(name, str(directory), wait_on_upload=True)
        else:
            output = self._clearml.OutputModel(task=task, name=name, framework="PyTorch")
            output.update_weights_package(
                weights_path=str(directory), target_filename=name, iteration=state.global_step, auto_delete_file=False
            )
        aliases = {"checkpoint_last": name}
        if state.best_model_checkpoint:
            aliases["checkpoint_best"] = Path(state.best_model_checkpoint).name
        task.set_user_properties(**aliases)

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        problem = within(UPLOAD_LIMIT_S, lambda: self._clearml_task.flush(wait_for_uploads=True))
        self._say("finished")  # now, because ClearML closes what is open before anybody else at the end of a process
        if problem is not None:
            raise problem

    def _say(self, status: Status) -> None:
        if self._clearml_task.is_offline():
            self._clearml_task.set_user_properties(status=status)

    def end(self, status: Status) -> None:
        task = self._clearml_task
        self._say(status)
        before = _handlers()
        problem = within(CLOSE_LIMIT_S, task.close)
        self._restore(before)
        if not task.is_offline():  # it closes each task as completed
            if status == "failed":
                task.mark_failed(status_reason="the training failed", force=True)
            elif status == "killed":
                task.mark_stopped(status_message="the training was stopped", force=True)
        if problem is not None:
            raise problem

    def _restore(self, handlers: dict[int, Any]) -> None:
        """Put `handlers` back, and in the place of ClearML's those before it.

        Closing puts those there that it found when the training had begun, which do nothing after it: the program could
        not be interrupted any more.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in handlers.items():
            if str(getattr(handler, "__module__", "")).startswith("clearml."):
                handler = self._handlers.get(number)
            if handler is not None and signal.getsignal(number) != handler:
                with contextlib.suppress(OSError, ValueError):  # one that cannot be handled
                    signal.signal(number, handler)


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}
