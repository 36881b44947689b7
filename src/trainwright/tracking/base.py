"""The base of all trackers: which rank logs, when a tracker's run begins and ends, what happens when it fails.

Owns: the callbacks that `report_to` names, the rank guard, which run a log line belongs to and with which status that
run ends, what of a resumed training a tracker has already, the names of scalars, and the rule that a tracker never ends
a training. Leaves to others: calls of the tracker (one file each), the content of a log line (`Trainer.log`), and the
file that remembers a tracker's run (`tracked_runs`).

A run begins with `setup` and ends once, with `end(status)`:

- `train()` raises or is interrupted, wherever it is: at once, "failed" or "killed" (Ctrl-C, a signal, `sys.exit`, a
  pruned trial);
- `train()` returns: the training is over, but its run stays open for the log lines of a later `evaluate()` or
  `predict()`, if the tracker says so (`stays_open`). It ends as "finished" when this tracker begins another run, also
  that of another Trainer, when `close()` is called, and when the process ends (then as "failed" or "killed" where an
  exception ended the program). In a search the run of a trial ends with the trial.

Each `train()` is a separate run; a second attempt of the same call (after a NaN, or out of memory) logs into the
first one's. A run that the user opened is logged into, and neither ended nor renamed. A tracker that fails to start is
an error if the user named it; one that is there because "all" includes it, and any that fails later, costs a warning.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import inspect
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from trainwright.callbacks.base import TrainerCallback
from trainwright.callbacks.notebook import in_notebook
from trainwright.interop.environment import EnvironmentValueError
from trainwright.interop.optional import MissingExtra
from trainwright.interop.trackers import TRACKERS, resolve_report_to
from trainwright.names import CHECKPOINT_PREFIX
from trainwright.redact import masked, without_passwords
from trainwright.state import TrainerControl, TrainerState
from trainwright.tracking import tracked_runs

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

Status = Literal["finished", "failed", "killed"]

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
    stays_open: ClassVar[bool] = True  # after train(), for a later evaluate(); False: the run ends with the training
    # True: a step that is logged again replaces what the tracker has. False: it would be there twice, so that log lines
    # which a resumed training repeats are left out.
    replaces_points: ClassVar[bool] = False
    # Seconds that `end` may take, in a separate thread, before the training continues without it; it may have to wait
    # for uploads. None: for a package that only the thread which opened a run can end.
    end_limit_s: ClassVar[float | None] = 300.0

    # On the class, so that a subclass whose __init__ forgets super() still works.
    _initialized = False  # a run is open
    _owns_run = False  # and was opened here, not by the user
    _pid = 0  # process that opened it; in a fork it is another's
    _switched_off = False
    _is_training = False  # within train(), for which the run is
    _has_trained = False  # the run has seen a training that is over
    _ended_as: Status | None = None  # the last run of this tracker; a log line may open it again
    _resume_id: str | None = None  # of the run that `setup` is to continue, as `run_id` returned it; None: a new one
    _record: tracked_runs.TrackedRun | None = None  # what a resume in another process needs to know
    _sent_before: Mapping[str, int] = {}  # name in the tracker -> last step that the continued run had already

    def __init__(self) -> None:
        tracker = TRACKERS[self.tracker_name]
        self._initialized = False
        self._switched_off = tracker.is_disabled
        if not self._switched_off and tracker.missing:
            raise MissingExtra(f"report_to={tracker.name!r}", tracker.missing, tracker.extra)

    # What a tracker defines.

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        """Import the package, open the run and upload the configuration.

        Sets `_owns_run` where it opened the run, before anything else can fail. With `_resume_id` it continues that
        run, if the package can.
        """
        raise NotImplementedError(f"{type(self).__name__} must define setup().")

    def run_id(self) -> str | None:
        """What `setup` needs to continue the open run in another process; None: the package cannot."""
        return None

    def arrived(self) -> Mapping[str, int] | None:
        """Name in the tracker -> last step, of the run that `setup` continued; None: only known from what was sent."""
        return None

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        """Send one log line: name -> value at `state.global_step`."""

    def log_checkpoint(self, directory: Path, args: TrainingArguments, state: TrainerState) -> None:
        """Send a checkpoint that was just written."""

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        """Training came to its end: send final values and flush. `end` follows, with `stays_open` later."""

    def end(self, status: Status) -> None:
        """End the run that `setup` opened; called once. Not for a run of the user's."""

    # For users.

    def close(self) -> None:
        """End the run as finished, because no more will be logged. Done anyway when the process ends."""
        self._end("finished")

    # Events.

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._is_training and self._initialized:  # another attempt of the same call of train()
            self._sent_before = self._sent() if state.global_step else {}
            return
        if self._has_trained or state.is_hyper_param_search:
            self._end("finished")
        self._is_training = True
        if self._initialized:  # by an evaluation before this training, which belongs to it
            self._remember(args, state, None)
        else:
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

    def training_ended(self, status: Status) -> None:
        """`train()` is over, in whichever way. No event: no other callback has it, and events end with the training."""
        if self._is_training:
            self._is_training, self._has_trained = False, True
            if status != "finished" or not self.stays_open:
                self._end(status)

    # Implementation.

    def _start(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, kwargs: dict[str, Any]
    ) -> bool:
        """Set up once; whether this rank logs."""
        if self._switched_off or not state.is_world_process_zero:
            return False
        if self._initialized:
            return True
        _end_idle_runs_of(self)
        name = self.tracker_name
        resumed = self._record  # a log line after the end of a run belongs to it
        if self._is_training:
            self._ended_as, resumed = None, None
            if state.global_step:
                resumed = tracked_runs.read(run_dir_of(args, state), name, getattr(state, "training_id", None))
        self._resume_id = resumed.id if resumed is not None else None
        # Some trackers document setup() without **kwargs, so an override may not take them.
        takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self.setup).parameters.values())
        try:
            self.setup(args, state, model, **(kwargs if takes_more else {}))
        except Exception as error:
            if self._owns_run:  # else an empty run would stay open
                self._initialized = True
                self._end("failed")
            if name in getattr(getattr(args, "report_to", None), "unasked", ()):
                self._switched_off = True
                warn_of_unasked(name, self._describe(error))
                return False
            if self._record is not None and not self._is_training:  # it had started: this opens its run again
                self._switch_off(error)
                return False
            if isinstance(error, (EnvironmentValueError, MissingExtra)):
                raise  # already names cause and remedy
            cause = None if self._holds_secret(error) else error
            raise RuntimeError(
                f"The tracker {name!r} could not start: {self._describe(error)}. Correct its settings "
                "or leave it out of report_to, which names it or is 'all'."
            ) from cause
        self._initialized = True
        if self._owns_run:
            self._pid = os.getpid()
            _open_runs[name] = self
            # The last one registered is called first: before the package's own, which knows no status.
            atexit.unregister(_end_open_runs)
            atexit.register(_end_open_runs)
        self._remember(args, state, resumed)
        return not self._switched_off

    def _end(self, status: Status) -> None:
        """End the open run, if it was opened here; what goes wrong, or takes too long, is a warning."""
        if not self._initialized:
            return
        self._initialized = self._has_trained = False
        if _open_runs.get(self.tracker_name) is self:
            del _open_runs[self.tracker_name]
        if self._owns_run:
            self._owns_run = False
            if status == "finished" and self._ended_as is not None:  # an evaluation after a training that failed
                status = self._ended_as
            self._ended_as = status
            problem = within(self.end_limit_s, lambda: self.end(status))
            if problem is not None:
                logger.warning(
                    "The run of the tracker %r could not be ended as %s; what was logged last may be missing there. %s",
                    self.tracker_name,
                    status,
                    self._describe(problem),
                )

    def _attempt(self, action: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Run `action`; when it fails, warn once and switch the tracker off."""
        if self._switched_off:
            return
        try:
            action(*args, **kwargs)
        except Exception as error:
            self._switch_off(error)

    def _switch_off(self, error: Exception) -> None:
        self._switched_off = True
        logger.warning(
            "The tracker %r failed and is switched off; training continues without it. %s",
            self.tracker_name,
            self._describe(error),
        )

    def without(self, key: str, why: object) -> None:
        """Warn, once per key, that what is named `key` is not in the tracker."""
        said: set[str] = self.__dict__.setdefault("_said", set())
        if key not in said:
            said.add(key)
            logger.warning("%r does not get %s: %s", self.tracker_name, key, without_secrets(str(why)))

    def optional(self, key: str, action: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """`action(...)`, whose failure costs a warning that names `key`. Whether it succeeded."""
        try:
            action(*args, **kwargs)
        except Exception as error:
            self.without(key, self._describe(error))
            return False
        return True

    def _log_line(self, logs: Mapping[str, Any], state: TrainerState) -> None:
        step, before, name_of = state.global_step, self._sent_before, self._name_of
        if before:
            logs = {name: value for name, value in logs.items() if step > before.get(name_of(name), -1)}
        numbers = numbers_of(logs)
        metrics = {**logs, **numbers} if self.takes_any_value else numbers
        for name, value in logs.items():
            if name not in metrics:
                self.without(name, f"it takes numbers only, and this is {type(value).__name__}")
        if metrics:
            self._send({name: value for name, value in metrics.items() if name not in self._refused()}, state)
            if self._record is not None:
                self.optional("tracker_runs", self._record.sent, map(name_of, metrics), step)

    def _send(self, metrics: dict[str, Any], state: TrainerState) -> None:
        """`log_metrics`, and after an error name by name: one that is refused costs a warning, not the others."""
        name_of = self._name_of
        try:
            self.log_metrics({name_of(name): value for name, value in metrics.items()}, state)
        except Exception:
            errors: dict[str, Exception] = {}
            for name, value in metrics.items():
                try:
                    self.log_metrics({name_of(name): value}, state)
                except Exception as error:
                    errors[name] = error
            if len(errors) == len(metrics):
                raise
            for name, refusal in errors.items():
                self._refused().add(name)
                self.without(name, self._describe(refusal))

    def _name_of(self, name: str) -> str:
        return _grouped(name) if self.rewrites_names else name

    def _refused(self) -> set[str]:
        refused: set[str] = self.__dict__.setdefault("_refused_names", set())
        return refused

    def _sent(self) -> Mapping[str, int]:
        """What is not sent again, as `_sent_before` has it."""
        return {} if self._record is None or self.replaces_points else dict(self._record.last_steps)

    def _remember(self, args: TrainingArguments, state: TrainerState, resumed: tracked_runs.TrackedRun | None) -> None:
        """Begin the record of the open run; where that is the run of `resumed`, it has what that says already."""
        run_id = None
        with contextlib.suppress(Exception):  # then it is not continued
            run_id = self.run_id()
        is_same = resumed is not None and run_id is not None and resumed.id == run_id
        last_steps = dict(resumed.last_steps) if resumed is not None and is_same else {}
        with contextlib.suppress(Exception):
            if is_same and (arrived := self.arrived()) is not None:
                last_steps = dict(arrived)
        training = getattr(state, "training_id", None) if self._is_training else None
        self._record = tracked_runs.TrackedRun(run_dir_of(args, state), self.tracker_name, training, run_id, last_steps)
        self._sent_before = self._sent() if is_same and self._is_training else {}

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
    """The trial's name in a search, else `run_name` where the user chose one (it defaults to `output_dir`).

    A trial without a name (`hp_name`) is called after `run_name` and the directory of its checkpoints.
    """
    if state.trial_name:
        return state.trial_name
    name = getattr(args, "run_name", None)
    chosen = name if name and name != args.output_dir else None
    if state.is_hyper_param_search and state.places_of_checkpoints:
        directory = os.path.basename(state.places_of_checkpoints[0])
        return f"{chosen}-{directory}" if chosen else directory
    return chosen


def group_of(args: TrainingArguments, state: TrainerState) -> str | None:
    """What the trials of a search have in common: `run_name`, which is `output_dir` by default. None: no search."""
    return (getattr(args, "run_name", None) or str(args.output_dir)) if state.is_hyper_param_search else None


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


def reporting_callbacks(report_to: Sequence[str] | None) -> list[Any]:
    """The callbacks of `args.report_to`: classes, and an instance for each tracker that the user did not name.

    One of those that cannot be made costs a warning.
    """
    unasked = getattr(report_to, "unasked", ())
    callbacks: list[Any] = []
    for found in get_reporting_integration_callbacks(report_to if report_to is not None else "none"):
        if found.tracker_name not in unasked:
            callbacks.append(found)
            continue
        try:
            callbacks.append(found())
        except Exception as error:
            warn_of_unasked(found.tracker_name, without_secrets(f"{type(error).__name__}: {error}"))
    return callbacks


def run_dir_of(args: TrainingArguments, state: TrainerState) -> str:
    """Directory of the checkpoints of this training."""
    return state.places_of_checkpoints[0] if state.places_of_checkpoints else str(args.output_dir)


def warn_of_unasked(name: str, problem: str) -> None:
    """A tracker that nobody named, but which is installed, does not work."""
    logger.warning(
        "The tracker %r is installed but could not start, and training continues without it. %s. Correct its settings, "
        'or name the trackers you want: report_to="none" is none.',
        name,
        problem.rstrip("."),
    )


def get_reporting_integration_callbacks(report_to: str | Sequence[str] | None) -> list[type[Any]]:
    """The callback classes that `report_to` names, in its order."""
    return [tracker_class(name) for name in resolve_report_to(report_to)]


# -- the end of a run --------------------------------------------------------------------------------------------------

_open_runs: dict[str, TrackerCallback] = {}  # by tracker, the callback that opened the run that is open


class HasCallbacks(Protocol):
    """The handler of callbacks: its list may be replaced while it is used."""

    callbacks: list[Any]


@contextlib.contextmanager
def tracked_training(handler: HasCallbacks) -> Iterator[None]:
    """Around one call of `train()`: tells the trackers among the callbacks of `handler` how it ended."""
    status: Status = "finished"
    try:
        yield
    except BaseException as error:
        status = status_of(error)
        raise
    finally:
        for callback in handler.callbacks:
            if isinstance(callback, TrackerCallback):
                callback.training_ended(status)


def end_trial(handler: HasCallbacks) -> None:
    """A trial of a search is over, with its last evaluation: its runs are finished."""
    for callback in handler.callbacks:
        if isinstance(callback, TrackerCallback):
            callback.close()


def status_of(error: BaseException | None) -> Status:
    """With which status a run ends that `error` left; None: nothing did."""
    if error is None:
        return "finished"
    # Optuna's, which need not be installed: the search ended this trial, nothing failed.
    is_pruned = any(base.__name__ == "TrialPruned" for base in type(error).__mro__)
    return "failed" if isinstance(error, Exception) and not is_pruned else "killed"


def _end_idle_runs_of(callback: TrackerCallback) -> None:
    """`callback` is about to open a run: that of another Trainer's training which is over ends here."""
    other = _open_runs.get(callback.tracker_name)
    if other is not None and other is not callback and not other._is_training and other._pid == os.getpid():
        other._end("finished")


def _end_open_runs() -> None:
    """The process ends, by itself or with an exception."""
    # Python sets it where an exception ends a program; a notebook continues after each of them.
    last = None if in_notebook() or hasattr(sys, "ps1") else getattr(sys, "last_value", None)
    for callback in [callback for callback in _open_runs.values() if callback._pid == os.getpid()]:
        callback._end("killed" if callback._is_training and last is None else status_of(last))


def within(limit_s: float | None, action: Callable[[], None]) -> BaseException | None:
    """Run `action` for at most `limit_s` seconds, in a thread; None: in this one, without limit. Returns its error, or
    a TimeoutError; the thread is left to itself then.
    """
    caught: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            caught.append(error)

    if limit_s is None:
        run()
        return caught[0] if caught else None
    thread = threading.Thread(target=run, name="trainwright-end-of-tracker", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is shutting down and starts no thread any more
        run()
    else:
        thread.join(limit_s)
        if thread.is_alive():
            return TimeoutError(f"it takes longer than {limit_s:g} s")
    return caught[0] if caught else None
