"""SwanLab.

Owns: `SwanLabCallback`. Leaves to others: SWANLAB_API_KEY, SWANLAB_MODE, SWANLAB_LOG_DIR, SWANLAB_WORKSPACE,
SWANLAB_RUN_ID and the hosts, which the package reads itself. Source: the documented variables of the integration.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, run_config, run_name_of

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments


class SwanLabCallback(TrackerCallback):
    """Send log lines and settings to a SwanLab experiment. One that runs already is used and never ended here.

    Environment:
        SWANLAB_PROJECT: project; the name of the working directory by default.
        SWANLAB_RESUME: "must", "allow" or "never"; "allow" where `resume_from_checkpoint` is set and SWANLAB_RUN_ID
            names the experiment.
    """

    tracker_name = "swanlab"

    def __init__(self) -> None:
        super().__init__()
        self._swanlab: Any = None

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        # Hidden from the package: since 0.10 it parses a variable of this name as JSON and fails on a plain word.
        project = os.environ.pop("SWANLAB_PROJECT", None)
        try:
            self._open(project, args, state, model)
        finally:
            if project is not None:
                os.environ["SWANLAB_PROJECT"] = project

    def _open(self, project: str | None, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        import swanlab

        self._swanlab = swanlab
        config = run_config(args, state, model)
        if swanlab.has_run():
            swanlab.config.update(config)
            return
        resume = os.environ.get("SWANLAB_RESUME")
        if resume is None and os.environ.get("SWANLAB_RUN_ID") and getattr(args, "resume_from_checkpoint", None):
            resume = "allow"
        chosen = {"project": project, "name": run_name_of(args, state), "resume": resume}
        swanlab.init(config=config, **{name: value for name, value in chosen.items() if value is not None})
        self._owns_run = True

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        self._swanlab.log(metrics, step=state.global_step)

    def end(self, status: Status) -> None:
        if self._swanlab.has_run():
            self._swanlab.finish()
