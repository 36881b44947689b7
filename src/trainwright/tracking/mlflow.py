"""MLflow.

Owns: `MLflowCallback` and the variables in its docstring. Leaves to others: MLFLOW_TRACKING_URI and credentials, which
the package reads itself. Source: seed 000.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainwright.interop.environment import EnvironmentValueError, env_flag
from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, group_of, run_config, run_name_of, within

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

_RUN_ID = "MLFLOW_RUN_ID"
FLUSH_LIMIT_S = 300.0  # for what is still in the queue; a server that is down would be tried for hours


class MLflowCallback(TrackerCallback):
    """Send log lines and settings to an MLflow run, under the names of the log line ("eval_loss").

    A run that is active already is logged into and stays active; the trials of a search are nested in it. The run of a
    training is the active one while it trains, and ends with it: FINISHED, FAILED or KILLED. What MLflow refuses, such
    as a name over 250 characters or another value for a setting of the run, costs a warning.

    Environment:
        MLFLOW_TRACKING_URI: directory, database or server that keeps the runs.
        MLFLOW_EXPERIMENT_NAME: experiment of the run, made where it does not exist.
        MLFLOW_RUN_ID: every training of the process continues this run, trials are nested in it; settings that it holds
            already stay as they are.
        MLFLOW_NESTED_RUN: true opens a run inside the active one, instead of using that.
        MLFLOW_TAGS: a JSON object of tags.
        MLFLOW_FLATTEN_PARAMS: true turns nested settings into "outer.inner".
        MLFLOW_MAX_LOG_PARAMS: at most so many settings.
        HF_MLFLOW_LOG_ARTIFACTS: true copies every checkpoint into the artifact store; the tags "checkpoint.last" and
            "checkpoint.best" name the two.
        DISABLE_MLFLOW_INTEGRATION: true sends nothing at all.
    """

    tracker_name = "mlflow"
    rewrites_names = False
    stays_open = False  # an active run of ours would be mistaken for one of the user's; what follows is sent by its id
    end_limit_s = None  # the active run is the thread's

    _opened: ClassVar[dict[str, MLflowCallback]] = {}  # by id, the open runs of this process that are not the user's

    def __init__(self) -> None:
        super().__init__()
        self._ml_flow: Any = None
        self._run_id: str | None = None
        self._log_artifacts = False
        self._is_second = False  # another callback ("mlflow" with "dagshub") sends the same to the same run
        self._sending: list[Any] = []  # of the log lines whose arrival is not known yet

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import mlflow

        # First, so that a value that cannot be read leaves no empty run.
        tags, max_params = _tags(), _max_params()
        self._ml_flow = mlflow
        self._log_artifacts = env_flag("HF_MLFLOW_LOG_ARTIFACTS")
        if self._resume_id is not None and not self._is_training:
            self._run_id = self._resume_id  # which has ended, and takes log lines all the same
            return
        self._run_id = self._open(args, state)
        if self._is_second:
            return
        # As stored: the data of `active_run()` are those of the moment when it was started.
        already = mlflow.MlflowClient().get_run(self._run_id).data.params
        self._log_params(run_config(args, state, model, sanitized=False), already, max_params)
        if (group := group_of(args, state)) is not None:
            tags = {"search": group, **tags}
        for name, value in tags.items():
            self.optional(f"the tag {name}", self._tag, name, value)

    def _open(self, args: TrainingArguments, state: TrainerState) -> str:
        """The id of the run to log into; `_owns_run` says whether it was opened here."""
        mlflow = self._ml_flow
        active, given = mlflow.active_run(), os.environ.get(_RUN_ID)
        is_trial = state.is_hyper_param_search
        opener = self._opened.get(active.info.run_id) if active is not None else None
        self._is_second = opener is not None and type(opener) is not type(self)
        # A training within another one, as in a callback, is nested in it.
        nested = env_flag("MLFLOW_NESTED_RUN") or is_trial or opener is not None
        if active is not None and (not nested or self._is_second):
            return str(active.info.run_id)
        if active is None and not given and (experiment := os.environ.get("MLFLOW_EXPERIMENT_NAME")):
            mlflow.set_experiment(experiment)
        name = run_name_of(args, state)
        with _variable_of_the_user():
            if is_trial and active is None and given:
                run = mlflow.start_run(run_name=name, parent_run_id=given)
            elif given and not is_trial:
                run = mlflow.start_run(run_id=given, nested=nested)
            else:
                run = self._resumed(nested) or mlflow.start_run(run_name=name, nested=nested)
        self._owns_run = True
        self._opened[run.info.run_id] = self
        return str(run.info.run_id)

    def _resumed(self, nested: bool) -> Any:
        """The run of the training that is resumed, or None, with a warning where it is gone."""
        if self._resume_id is None:
            return None
        try:
            return self._ml_flow.start_run(run_id=self._resume_id, nested=nested)
        except self._ml_flow.exceptions.MlflowException as error:
            logger.warning("The MLflow run of this training cannot be continued; it gets a new one. %s", error)
            return None

    def run_id(self) -> str | None:
        return self._run_id

    def _log_params(self, values: Mapping[str, Any], already: Mapping[str, str], max_params: int | None) -> None:
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        params = _flat(values) if env_flag("MLFLOW_FLATTEN_PARAMS") else dict(values)
        sent: dict[str, Any] = {}
        changed: list[str] = []
        for key, value in list(params.items())[:max_params]:
            name, text = _allowed(str(key)), str(value)
            if (refusal := _refusal(name)) is not None:
                self.without(name, refusal)
            elif len(text) > MAX_PARAM_VAL_LENGTH:
                self.without(name, f"a setting has at most {MAX_PARAM_VAL_LENGTH} characters, and this {len(text)}")
            elif already.get(name, text) != text:
                changed.append(name)
            elif name not in already:
                sent[name] = value
        if changed:
            logger.warning(
                "MLflow changes no setting of a run: %s has %s from before.", self._run_id, ", ".join(sorted(changed))
            )
        items = list(sent.items())
        for start in range(0, len(items), MAX_PARAMS_TAGS_PER_BATCH):
            self._log_batch(dict(items[start : start + MAX_PARAMS_TAGS_PER_BATCH]))

    def _log_batch(self, params: dict[str, Any]) -> None:
        try:
            self._ml_flow.log_params(params, run_id=self._run_id)
        except self._ml_flow.exceptions.MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            for name, value in params.items():
                self.optional(name, self._ml_flow.log_params, {name: value}, run_id=self._run_id)

    def _tag(self, name: str, value: Any) -> None:
        self._ml_flow.MlflowClient().set_tag(self._run_id, name, value)

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        if self._is_second:
            return
        named: dict[str, float] = {}
        for name, value in metrics.items():
            # Said here, because what is refused later, in MLflow's queue, is lost without a word.
            if (refusal := _refusal(_allowed(name))) is not None:
                self.without(name, refusal)
            else:
                named[_allowed(name)] = float(value)
        # Asynchronous, because a distant server must not hold up a step.
        sending = self._ml_flow.log_metrics(named, step=state.global_step, run_id=self._run_id, synchronous=False)
        self._sending = [*self._sending[-99:], sending]
        if not self._owns_run:  # training is over, or the run is the user's and may be read or ended any time
            self._flush()

    def _flush(self) -> None:
        """Wait until all log lines have arrived; raises the error of one that did not."""
        sending, self._sending = self._sending, []

        def flush() -> None:
            self._ml_flow.flush_async_logging()
            for line in sending:
                line.wait()

        problem = within(FLUSH_LIMIT_S, flush)
        if problem is not None:
            raise problem

    def log_checkpoint(self, directory: Path, args: TrainingArguments, state: TrainerState) -> None:
        if self._log_artifacts and not self._is_second:
            self._ml_flow.log_artifacts(str(directory), artifact_path=directory.name, run_id=self._run_id)
            self._tag("checkpoint.last", directory.name)
            if state.best_model_checkpoint:
                self._tag("checkpoint.best", Path(state.best_model_checkpoint).name)

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        self._flush()

    def end(self, status: Status) -> None:
        mlflow = self._ml_flow
        self._opened.pop(str(self._run_id), None)
        try:
            self._flush()
        finally:
            with _variable_of_the_user():
                while self._is_inside(active := mlflow.active_run()):  # opened by the user, and left open
                    mlflow.end_run(status.upper())
                if active is not None and active.info.run_id == self._run_id:
                    mlflow.end_run(status.upper())
                else:
                    mlflow.MlflowClient().set_terminated(self._run_id, status.upper())

    def _is_inside(self, run: Any) -> bool:
        """Whether `run` is nested in the run of this training."""
        client = self._ml_flow.MlflowClient()
        parent = run.data.tags.get("mlflow.parentRunId") if run is not None else None
        while parent is not None and parent != self._run_id:
            parent = client.get_run(parent).data.tags.get("mlflow.parentRunId")
        return parent is not None


@contextlib.contextmanager
def _variable_of_the_user() -> Iterator[None]:
    """MLFLOW_RUN_ID is not there within, and is as before afterwards: MLflow uses it once and deletes it."""
    given = os.environ.pop(_RUN_ID, None)
    try:
        yield
    finally:
        if given is not None:
            os.environ[_RUN_ID] = given


def _max_params() -> int | None:
    limit = os.environ.get("MLFLOW_MAX_LOG_PARAMS")
    if limit and not limit.isdigit():
        raise EnvironmentValueError(f"MLFLOW_MAX_LOG_PARAMS={limit!r} must be a whole number.")
    return int(limit) if limit else None


def _refusal(name: str) -> str | None:
    """Why MLflow takes no value under this name; None: it does."""
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH

    if len(name) > MAX_ENTITY_KEY_LENGTH:
        return f"a name has at most {MAX_ENTITY_KEY_LENGTH} characters, and this {len(name)}"
    path = posixpath.normpath(name)
    if path != name or path.startswith(("..", "/")) or path == ".":
        return f"a name is a path to MLflow, and this one leads to {path!r}"
    return None


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
