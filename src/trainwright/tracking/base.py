"""The base of all trackers: which rank logs, when a tracker starts, what happens when it fails.

Owns: the callbacks that `report_to` names, the rank guard, one `setup` per run, the names of scalars, and the rule that
a tracker never ends a training: it may refuse to start, with an error that says why, but one that fails later is
switched off with one warning. Leaves to others: calls of the tracker (one file each) and the content of a log line
(`Trainer.log`).

After `train()` a hosted run stays open, because the log lines of a later `evaluate()` or `predict()` belong to it; each
package ends it when the process ends. In a hyper-parameter search every trial is a separate run, closed with the trial.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainwright.callbacks.base import TrainerCallback
from trainwright.interop.environment import EnvironmentValueError
from trainwright.interop.optional import MissingExtra
from trainwright.interop.trackers import TRACKERS, resolve_report_to
from trainwright.names import CHECKPOINT_PREFIX
from trainwright.redact import masked, without_passwords
from trainwright.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

# What a log line holds once, at the end of training; trackers with a summary put it there instead of on a curve.
TOTALS = frozenset({"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"})


class TrackerCallback(TrainerCallback):
    """The base of all trackers. A tracker defines `tracker_name`, `setup`, `log_metrics`, and optionally the others.

    `setup(args, state, model, **kwargs)` is also what users override to customise a tracker; it runs on rank 0 only,
    once per run, before anything is logged.
    """

    tracker_name: ClassVar[str]
    rewrites_names: ClassVar[bool] = True  # "eval_loss" -> "eval/loss"; False keeps the names of the log line
    takes_any_value: ClassVar[bool] = False  # True for trackers that accept text, images and tables besides numbers

    # On the class, so that a subclass whose __init__ forgets super() still works.
    _initialized = False
    _switched_off = False

    def __init__(self) -> None:
        tracker = TRACKERS[self.tracker_name]
        self._initialized = False
        self._switched_off = tracker.is_disabled
        if not self._switched_off and tracker.missing:
            raise MissingExtra(f"report_to={tracker.name!r}", tracker.missing, tracker.extra)

    # What a tracker defines.

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        """Import the package, open the run and upload the configuration."""
        raise NotImplementedError(f"{type(self).__name__} must define setup().")

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        """Send one log line: name -> value at `state.global_step`."""

    def log_checkpoint(self, directory: Path, args: TrainingArguments, state: TrainerState) -> None:
        """Send a checkpoint that was just written."""

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        """Training ended: send final values and flush."""

    def close(self) -> None:
        """End the run. Called between two trials of a search; users may call it when no more will be logged."""

    # Events.

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_hyper_param_search and self._initialized:  # the trial before did not reach its end
            self._attempt(self.close)
            self._initialized = False
        self._start(args, state, model, kwargs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and self._start(args, state, kwargs.pop("model", None), kwargs):
            self._attempt(self._log_line, logs, state)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        if metrics and self._start(args, state, kwargs.pop("model", None), kwargs):
            self._attempt(self._log_line, metrics, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._initialized:
            directory = kwargs.get("checkpoint_dir") or f"{args.output_dir}/{CHECKPOINT_PREFIX}-{state.global_step}"
            self._attempt(self.log_checkpoint, Path(directory), args, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._initialized:
            self._attempt(self.finish, args, state, model, **kwargs)
            if state.is_hyper_param_search:
                self._attempt(self.close)
                self._initialized = False

    # Implementation.

    def _start(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, kwargs: dict[str, Any]
    ) -> bool:
        """Set up once; whether this rank logs."""
        if self._switched_off or not state.is_world_process_zero:
            return False
        if not self._initialized:
            # Some trackers document setup() without **kwargs, so an override may not take them.
            takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self.setup).parameters.values())
            try:
                self.setup(args, state, model, **(kwargs if takes_more else {}))
            except (EnvironmentValueError, MissingExtra):
                raise  # already names cause and remedy
            except Exception as error:
                cause = None if self._holds_secret(error) else error
                raise RuntimeError(
                    f"The tracker {self.tracker_name!r} could not start: {self._describe(error)}. Correct its settings "
                    "or leave it out of report_to, which names it or is 'all'."
                ) from cause
            self._initialized = True
        return not self._switched_off

    def _attempt(self, action: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Run `action`; when it fails, warn once and switch the tracker off."""
        if self._switched_off:
            return
        try:
            action(*args, **kwargs)
        except Exception as error:
            self._switched_off = True
            logger.warning(
                "The tracker %r failed and is switched off; training continues without it. %s",
                self.tracker_name,
                self._describe(error),
            )

    def _log_line(self, logs: Mapping[str, Any], state: TrainerState) -> None:
        numbers = numbers_of(logs)
        metrics = {**logs, **numbers} if self.takes_any_value else numbers
        dropped = [name for name in logs if name not in metrics]
        if dropped:
            logger.warning("%r takes numbers only; not sent: %s.", self.tracker_name, ", ".join(dropped))
        if metrics:
            self.log_metrics(rewrite_logs(metrics) if self.rewrites_names else metrics, state)

    def _describe(self, error: BaseException) -> str:
        return without_secrets(f"{type(error).__name__}: {error}")

    def _holds_secret(self, error: BaseException) -> bool:
        return without_secrets(str(error)) != str(error)


def rewrite_logs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Group names by the part of training they come from.

    >>> rewrite_logs({"loss": 1.0, "eval_loss": 2.0, "test_loss": 3.0})
    {'train/loss': 1.0, 'eval/loss': 2.0, 'test/loss': 3.0}
    """
    return {_grouped(name): value for name, value in logs.items()}


def _grouped(name: str) -> str:
    for group in ("eval", "test"):
        if name.startswith(f"{group}_"):
            return f"{group}/{name[len(group) + 1 :]}"
    return f"train/{name}"


def numbers_of(logs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a log line: Python ones, and arrays or tensors with one element (read once per log line)."""
    numbers: dict[str, float] = {}
    for name, value in logs.items():
        if isinstance(value, (int, float)):
            numbers[name] = value
        elif hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:
            numbers[name] = value.item()
    return numbers


def arguments_of(args: TrainingArguments, sanitized: bool = True) -> dict[str, Any]:
    """The training arguments as plain values (`sanitized`: numbers and text only), without secrets."""
    values = args.to_sanitized_dict() if sanitized and hasattr(args, "to_sanitized_dict") else args.to_dict()
    return masked(values)


def model_config_of(model: nn.Module | None) -> dict[str, Any]:
    """The model's configuration, and that of its adapters under "peft_config"; {} for a plain module."""
    config: dict[str, Any] = {}
    of_model: Any = getattr(model, "config", None)
    if isinstance(of_model, Mapping):
        config.update(of_model)
    elif of_model is not None and hasattr(of_model, "to_dict"):
        config.update(of_model.to_dict())
    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, Mapping):
        config["peft_config"] = {name: adapter.to_dict() for name, adapter in adapters.items()}
    return config


def run_config(
    args: TrainingArguments, state: TrainerState, model: nn.Module | None, sanitized: bool = True
) -> dict[str, Any]:
    """The configuration of a run: of the model, the training arguments, overridden by the trial's hyper-parameters."""
    return {**model_config_of(model), **arguments_of(args, sanitized), **(state.trial_params or {})}


def run_name_of(args: TrainingArguments, state: TrainerState) -> str | None:
    """The trial's name in a search, else `run_name` where the user chose one (it defaults to `output_dir`)."""
    if state.trial_name:
        return state.trial_name
    name = getattr(args, "run_name", None)
    return name if name and name != args.output_dir else None


def without_secrets(text: str) -> str:
    """`text` without the values of environment variables that hold a key, token or password, and without passwords in
    URLs.
    """
    for variable, value in os.environ.items():
        if len(value) >= 8 and re.search(r"TOKEN|KEY|SECRET|PASSWORD", variable):
            text = text.replace(value, f"<{variable}>")
    return without_passwords(text)


def tracker_class(name: str) -> type[Any]:
    """The callback class of one tracker. Imports its file here, not the tracker's package."""
    found: type[Any] = getattr(importlib.import_module(f"trainwright.tracking.{name}"), TRACKERS[name].class_name)
    return found


def get_reporting_integration_callbacks(report_to: str | Sequence[str] | None) -> list[type[Any]]:
    """The callback classes that `report_to` names, in its order."""
    return [tracker_class(name) for name in resolve_report_to(report_to)]
