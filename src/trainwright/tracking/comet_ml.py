"""Comet.

Owns: `CometCallback` and the variables in its docstring. Leaves to others: all other COMET_* variables, which the
package reads itself. Source: seed 000.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from trainwright.interop.environment import env_choice, env_flag
from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, arguments_of, model_config_of, run_name_of

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)


class CometCallback(TrackerCallback):
    """Send log lines, settings and the files of `output_dir` to a Comet experiment.

    Environment:
        COMET_MODE: "get_or_create" (default) continues the experiment COMET_EXPERIMENT_KEY where it exists, "get"
            insists on it, "create" makes a new one. ONLINE, OFFLINE (older: now COMET_START_ONLINE=1 or 0) and
            DISABLED (older: now `report_to`) are understood.
        COMET_PROJECT_NAME: project.
        COMET_LOG_ASSETS: false leaves out the files of `output_dir`, which are sent when training ends.
    """

    tracker_name = "comet_ml"

    def __init__(self) -> None:
        super().__init__()
        self._experiment: Any = None
        modes = ("get_or_create", "create", "get", "online", "offline", "disabled")
        self._mode = env_choice("COMET_MODE", modes, default="get_or_create")
        if self._mode == "disabled":
            logger.warning("COMET_MODE=DISABLED is an older way to write report_to without 'comet_ml'.")
            self._switched_off = True

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import comet_ml

        # None leaves the choice to COMET_START_ONLINE, which the package reads.
        online = {"online": True, "offline": False}.get(self._mode)
        mode = "get_or_create" if online is not None else self._mode
        running = comet_ml.get_running_experiment()
        if running is not None and running.ended:  # the package returns the last one, of an earlier training
            running = None
        if state.is_hyper_param_search and running is None:
            mode = "create"  # one experiment per trial
        self._experiment = running or comet_ml.start(
            online=online, mode=mode, project_name=os.environ.get("COMET_PROJECT_NAME")
        )
        self._owns_run = running is None
        if self._owns_run and (name := run_name_of(args, state)):
            self._experiment.set_name(name)
        self._experiment.log_other("Created from", "trainwright")
        self._experiment.log_parameters(
            {**arguments_of(args, sanitized=False), **(state.trial_params or {})}, prefix="args/"
        )
        if config := model_config_of(model):
            self._experiment.log_parameters(config, prefix="config/")
        if model is not None:
            self._experiment.set_model_graph(str(model))

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        self._experiment.log_metrics(metrics, step=state.global_step, epoch=state.epoch)

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        if env_flag("COMET_LOG_ASSETS", default=True) and os.path.isdir(str(args.output_dir)):
            self._experiment.log_asset_folder(
                args.output_dir, recursive=True, log_file_name=True, step=state.global_step
            )

    def end(self, status: Status) -> None:
        self._experiment.end()
