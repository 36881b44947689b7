"""Neptune.

Owns: `NeptuneCallback`, its arguments and the names under which things appear in a run. Leaves to others: NEPTUNE_*
variables, which the package reads itself. Source: seed 000. The hosted service has announced its end; the offline mode
and existing servers keep working.
"""

from __future__ import annotations

import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainwright.names import closest
from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, arguments_of, group_of, model_config_of, run_name_of
from trainwright.tracking.model_files import best_directory

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

_UPLOADS = ("same", "last", "best", None)


class NeptuneCallback(TrackerCallback):
    """Send log lines, settings and checkpoints to a Neptune run.

    Args:
        api_token: token; NEPTUNE_API_TOKEN when left out. Never logged.
        project: "workspace/project"; NEPTUNE_PROJECT when left out.
        name: name of the run; `run_name` when left out.
        base_namespace: where in the run everything is put.
        run: a run to continue; it is not ended here.
        log_parameters: whether arguments and model configuration are sent.
        log_checkpoints: "same" uploads every checkpoint, "last" the newest over the one before, "best" the best so far
            (at the end of training), None nothing.
        neptune_run_kwargs: further arguments of `neptune.init_run`.

    The trials of a search share a group tag. A run that failed or was killed has `sys/failed`. Each run has a
    `custom_run_id`, by which a resumed training continues it.

    Environment:
        NEPTUNE_CUSTOM_RUN_ID: the run of the first training of a process; later ones and trials have new ones.
    """

    tracker_name = "neptune"

    _used_ids: ClassVar[set[str]] = set()  # custom ids of the runs that this process started

    def __init__(
        self,
        api_token: str | None = None,
        project: str | None = None,
        name: str | None = None,
        base_namespace: str = "finetuning",
        run: Any = None,
        log_parameters: bool = True,
        log_checkpoints: str | None = None,
        **neptune_run_kwargs: Any,
    ) -> None:
        super().__init__()
        if log_checkpoints not in _UPLOADS:
            raise ValueError(
                f"log_checkpoints={log_checkpoints!r} must be one of {list(_UPLOADS)}."
                f"{closest(log_checkpoints, _UPLOADS)}"
            )
        self._run = run
        self._id: str | None = None
        self._namespace = base_namespace.strip("/")
        self._log_parameters = log_parameters
        self._log_checkpoints = log_checkpoints
        self._init_kwargs = {"project": project, "name": name, **neptune_run_kwargs}
        self._api_token = api_token

    @property
    def run(self) -> Any:
        """The Neptune run, for additional logging; None before training starts."""
        return self._run

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        if self._run is None:
            self._open(args, state)
        if self._log_parameters:
            from neptune.utils import stringify_unsupported

            arguments = floats_as_annotated(arguments_of(args), args)
            self._at("trainer_parameters").assign(stringify_unsupported(arguments))
            if config := model_config_of(model):
                config = floats_as_annotated(config, getattr(model, "config", None))
                self._at("model_parameters").assign(stringify_unsupported(config))
        if state.trial_name or state.trial_params:
            self._at("trial").assign(state.trial_name or "trial")
            self._at("trial_params").assign(floats_as_annotated(state.trial_params or {}, args))

    def _open(self, args: TrainingArguments, state: TrainerState) -> None:
        import neptune

        chosen = {**self._init_kwargs, "name": self._init_kwargs["name"] or run_name_of(args, state)}
        if not chosen.get("with_id"):
            custom = chosen.get("custom_run_id") or os.environ.get("NEPTUNE_CUSTOM_RUN_ID")
            if self._resume_id is not None:
                custom = self._resume_id
            elif custom is None or custom in self._used_ids or state.is_hyper_param_search:
                custom = uuid.uuid4().hex
            self._used_ids.add(custom)
            chosen["custom_run_id"] = custom
        self._id = chosen.get("with_id") or chosen["custom_run_id"]
        self._run = neptune.init_run(api_token=self._api_token, **chosen)
        self._owns_run = True
        if group := group_of(args, state):
            self._run["sys/group_tags"].add(group)

    def run_id(self) -> str | None:
        mode = self._init_kwargs.get("mode") or os.environ.get("NEPTUNE_MODE")
        return None if mode == "offline" else self._id  # which is not stored offline

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._at(name).append(value, step=state.global_step)
            else:
                self.without(name, "Neptune drops NaN and infinity")

    def log_checkpoint(self, directory: Path, args: TrainingArguments, state: TrainerState) -> None:
        if self._log_checkpoints == "same":
            self._upload(directory, f"checkpoints/{directory.name}")
        elif self._log_checkpoints == "last":
            self._upload(directory, "checkpoints/last")

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        if self._log_checkpoints == "best" and state.best_model_checkpoint:
            directory = best_directory(args, state, then="nothing is uploaded")
            if directory is not None:
                self._upload(directory, "checkpoints/best")
        self._run.wait(disk_only=True)

    def end(self, status: Status) -> None:
        run, self._run = self._run, None
        if status != "finished":
            run["sys/failed"] = True
        run.stop()

    def _at(self, name: str) -> Any:
        return self._run[f"{self._namespace}/{name}"]

    def _upload(self, directory: Path, name: str) -> None:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                # Waited for, because save_total_limit may delete the file before a background upload has read it.
                self._at(f"{name}/{path.relative_to(directory).as_posix()}").upload(str(path), wait=True)

    def _describe(self, error: BaseException) -> str:
        text = super()._describe(error)
        return text.replace(self._api_token, "<api_token>") if self._api_token else text

    def _holds_secret(self, error: BaseException) -> bool:
        return super()._holds_secret(error) or bool(self._api_token and self._api_token in str(error))


def floats_as_annotated(values: Mapping[str, Any], owner: object) -> dict[str, Any]:
    """`values` with whole numbers as floats where the class of `owner` annotates a float.

    The first value of a Neptune field gives it its type: 0 makes one of integers, in which a later 0.1 is 0.
    """
    annotations = {
        name: str(annotation)  # not resolved, because they may name what is imported for type checkers only
        for kind in reversed(type(owner).__mro__)
        for name, annotation in vars(kind).get("__annotations__", {}).items()
    }
    return {
        name: float(value) if type(value) is int and re.search(r"\bfloat\b", annotations.get(name, "")) else value
        for name, value in values.items()
    }
