"""MLflow.

Owns: `MLflowCallback` and the variables in its docstring. Leaves to others: MLFLOW_TRACKING_URI and credentials, which
the package reads itself. Source: seed 000.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.interop.environment import EnvironmentValueError, env_flag
from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, run_config, run_name_of

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)


class MLflowCallback(TrackerCallback):
    """Send log lines and settings to an MLflow run, under the names of the log line ("eval_loss").

    Environment:
        MLFLOW_TRACKING_URI: directory, database or server that keeps the runs.
        MLFLOW_EXPERIMENT_NAME: experiment of the run, made where it does not exist.
        MLFLOW_RUN_ID: continue this run; settings that it holds already stay as they are.
        MLFLOW_NESTED_RUN: true opens a run inside the active one, instead of using that.
        MLFLOW_TAGS: a JSON object of tags.
        MLFLOW_FLATTEN_PARAMS: true turns nested settings into "outer.inner".
        MLFLOW_MAX_LOG_PARAMS: at most so many settings.
        HF_MLFLOW_LOG_ARTIFACTS: true copies every checkpoint into the artifact store.
        DISABLE_MLFLOW_INTEGRATION: true sends nothing at all.
    """

    tracker_name = "mlflow"
    rewrites_names = False
    stays_open = False  # an active run of ours would be taken for one of the user's
    end_limit_s = None  # the active run is the thread's

    def __init__(self) -> None:
        super().__init__()
        self._ml_flow: Any = None
        self._run_id: str | None = None
        self._log_artifacts = False

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import mlflow

        self._ml_flow = mlflow
        self._log_artifacts = env_flag("HF_MLFLOW_LOG_ARTIFACTS")
        run = mlflow.active_run()
        nested = env_flag("MLFLOW_NESTED_RUN")
        if run is None or nested:
            if run is None and (experiment := os.environ.get("MLFLOW_EXPERIMENT_NAME")):
                mlflow.set_experiment(experiment)
            run_id = self._resume_id or os.environ.get("MLFLOW_RUN_ID")
            name = None if run_id else run_name_of(args, state)
            run = mlflow.start_run(run_id=run_id, run_name=name, nested=nested)
            self._owns_run = True
        self._run_id = run.info.run_id
        self._log_params(run_config(args, state, model, sanitized=False), already=run.data.params)
        if tags := _tags():
            mlflow.set_tags(tags)

    def _log_params(self, values: Mapping[str, Any], already: Mapping[str, str]) -> None:
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        params = _flat(values) if env_flag("MLFLOW_FLATTEN_PARAMS") else dict(values)
        params = {_allowed(name): value for name, value in params.items() if name not in already}
        too_long = [name for name, value in params.items() if len(str(value)) > MAX_PARAM_VAL_LENGTH]
        if too_long:
            logger.warning("MLflow keeps %d characters of a setting; left out: %s", MAX_PARAM_VAL_LENGTH, too_long)
        items = [(name, value) for name, value in params.items() if name not in too_long]
        if limit := os.environ.get("MLFLOW_MAX_LOG_PARAMS"):
            if not limit.isdigit():
                raise EnvironmentValueError(f"MLFLOW_MAX_LOG_PARAMS={limit!r} must be a whole number.")
            items = items[: int(limit)]
        for start in range(0, len(items), MAX_PARAMS_TAGS_PER_BATCH):
            self._ml_flow.log_params(dict(items[start : start + MAX_PARAMS_TAGS_PER_BATCH]))

    def run_id(self) -> str | None:
        return self._run_id

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        # Asynchronous, because a distant server must not hold up a step.
        named = {_allowed(name): value for name, value in metrics.items()}
        self._ml_flow.log_metrics(named, step=state.global_step, run_id=self._run_id, synchronous=False)
        if not self._owns_run or not self._is_training:  # it may be read or ended any time
            self._ml_flow.flush_async_logging()

    def log_checkpoint(self, directory: Path, args: TrainingArguments, state: TrainerState) -> None:
        if self._log_artifacts:
            self._ml_flow.log_artifacts(str(directory), artifact_path=directory.name, run_id=self._run_id)

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        self._ml_flow.flush_async_logging()

    def end(self, status: Status) -> None:
        self._ml_flow.end_run(status.upper())


def _tags() -> dict[str, Any]:
    text = os.environ.get("MLFLOW_TAGS")
    if not text:
        return {}
    try:
        tags = json.loads(text)
    except json.JSONDecodeError:
        tags = None
    if not isinstance(tags, dict):
        raise EnvironmentValueError(
            f'MLFLOW_TAGS={text!r} must be a JSON object, such as {{"release.candidate": "RC1"}}.'
        )
    return tags


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty mapping stays as a value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _allowed(name: str) -> str:
    """`name` with the characters that MLflow refuses in metric and parameter names replaced."""
    return re.sub(r"[^\w\-. :/]", "_", name)
