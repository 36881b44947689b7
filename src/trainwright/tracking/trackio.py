"""Trackio.

Owns: `TrackioCallback`, and the arguments `project`, `trackio_space_id`, `trackio_bucket_id`, `trackio_static_space_id`
and `hub_private_repo`. Leaves to others: TRACKIO_DIR and other TRACKIO_* variables, which the package reads itself.
Source: `api.json` (arguments).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainwright.state import TrainerState
from trainwright.tracking.base import Status, group_of, run_config, run_name_of
from trainwright.tracking.model_artifacts import ModelArtifacts

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

DEFAULT_PROJECT = "huggingface"


class TrackioCallback(ModelArtifacts):
    """Send log lines and settings to a Trackio project: on this machine, or in the Space `trackio_space_id`.

    Trackio keeps no status of a run: one that fails or is stopped has an alert that says so. A run that exists already
    (`trackio.init()` was called) is used and never ended here.

    Environment:
        TRACKIO_PROJECT, TRACKIO_SPACE_ID: what scripts for older releases set; they count where the arguments were not
            given.
        TRACKIO_LOG_MODEL: ours: "end" stores the trained model as an artifact when training ends (the best one with
            `load_best_model_at_end`), "checkpoint" every checkpoint too, as versions of one artifact whose aliases
            "last" and "best" move on, "false" (default) nothing.
    """

    tracker_name = "trackio"
    takes_any_value = True
    log_model_variable = "TRACKIO_LOG_MODEL"
    end_limit_s = None  # it has its own limits, and its current run is the thread's

    def __init__(self) -> None:
        super().__init__()
        self._trackio: Any = None
        self._project = DEFAULT_PROJECT

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import trackio

        self._trackio = self._package = trackio
        self._project = getattr(args, "project", DEFAULT_PROJECT)
        if self._project == DEFAULT_PROJECT:
            self._project = os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT)
        chosen = {
            "space_id": getattr(args, "trackio_space_id", None) or os.environ.get("TRACKIO_SPACE_ID"),
            "bucket_id": getattr(args, "trackio_bucket_id", None),
            "private": getattr(args, "hub_private_repo", None),
            "name": run_name_of(args, state),
            "group": group_of(args, state),
        }
        if self._resume_id is not None:
            chosen["name"] = self._resume_id.partition(" ")[2]
        config = run_config(args, state, model)
        self._run = trackio.context_vars.current_run.get()
        if self._run is None:
            self._run = trackio.init(
                project=self._project,
                resume="never" if self._resume_id is None else "allow",
                config={name: value for name, value in config.items() if not name.startswith("_")},
                **{name: value for name, value in chosen.items() if value is not None},
            )
            self._owns_run = True
        # Those of every model of transformers; `init` refuses them.
        known = self._run.config
        self.optional(
            "the configuration", known.update, {name: value for name, value in config.items() if name not in known}
        )

    def run_id(self) -> str | None:
        return f"{self._run.id} {self._run.name}"  # it continues a run by its name

    def arrived(self) -> Mapping[str, int] | None:
        if not self._run._is_local:
            return None
        from trackio.sqlite_storage import SQLiteStorage

        last_steps: dict[str, int] = {}
        for line in SQLiteStorage.get_logs(self._project, self._run.name, run_id=self._run.id):
            last_steps.update(dict.fromkeys(line, line["step"]))
        return last_steps

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        self._run.log(metrics, step=state.global_step)

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        super().finish(args, state, model, **kwargs)
        static_space = getattr(args, "trackio_static_space_id", None)
        if static_space:
            self.close()  # a later log line continues the run
            self._trackio.sync(project=self._project, space_id=static_space, sdk="static", force=True)

    def end(self, status: Status) -> None:
        run, self._run = self._run, None
        if status != "finished":
            level = self._trackio.AlertLevel.ERROR if status == "failed" else self._trackio.AlertLevel.WARN
            self.optional("the status", run.alert, f"Training {status}", level=level)
        run.finish()
        if self._trackio.context_vars.current_run.get() is run:
            self._trackio.context_vars.current_run.set(None)
