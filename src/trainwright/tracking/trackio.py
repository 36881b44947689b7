"""Trackio.

Owns: `TrackioCallback`, and the arguments `project`, `trackio_space_id`, `trackio_bucket_id`, `trackio_static_space_id`
and `hub_private_repo`. Leaves to others: TRACKIO_DIR and other TRACKIO_* variables, which the package reads itself.
Source: `api.json` (arguments).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, run_config, run_name_of

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

DEFAULT_PROJECT = "huggingface"


class TrackioCallback(TrackerCallback):
    """Send log lines and settings to a Trackio project: on this machine, or in the Space `trackio_space_id`.

    TRACKIO_PROJECT and TRACKIO_SPACE_ID, which scripts for older releases set, count where the arguments were not
    given.
    """

    tracker_name = "trackio"
    takes_any_value = True

    def __init__(self) -> None:
        super().__init__()
        self._trackio: Any = None
        self._run: Any = None
        self._project = DEFAULT_PROJECT

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import trackio

        self._trackio = trackio
        self._project = getattr(args, "project", DEFAULT_PROJECT)
        if self._project == DEFAULT_PROJECT:
            self._project = os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT)
        chosen = {
            "space_id": getattr(args, "trackio_space_id", None) or os.environ.get("TRACKIO_SPACE_ID"),
            "bucket_id": getattr(args, "trackio_bucket_id", None),
            "private": getattr(args, "hub_private_repo", None),
            "name": run_name_of(args, state),
        }
        self._run = trackio.init(
            project=self._project,
            resume="allow",
            config=run_config(args, state, model),
            **{name: value for name, value in chosen.items() if value is not None},
        )

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        self._run.log(metrics, step=state.global_step)

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        static_space = getattr(args, "trackio_static_space_id", None)
        if static_space:
            self.close()  # a later log line continues the run
            self._trackio.sync(project=self._project, space_id=static_space, sdk="static", force=True)

    def end(self, status: Status) -> None:
        run, self._run = self._run, None
        run.finish()
