"""The state of a run (`TrainerState`), the flags that its callbacks set (`TrainerControl`), and stateful callbacks.

Owns: these three data structures and their JSON serialisation. Leaves to others: updating the fields (the loop,
`Trainer.log`, `checkpoint/best`). Imports no torch. Source: seed 000 (fields,
defaults, meaning).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainwright.checkpoint.json_files import read_trainer_state
from trainwright.log_text import LogText, StateText
from trainwright.log_values import plain_line, plain_value
from trainwright.safe_write import write_bytes

logger = logging.getLogger(__name__)

_EMPTY_LOG = '\n  "log_history": []'


class ExportableState:
    """An object whose state is saved in a checkpoint and restored from it (a callback, `TrainerControl`).

    Implement `state()`; its `"args"` are passed to the constructor and its `"attributes"` are set on the new object.

        class Patience(TrainerCallback, ExportableState):
            def __init__(self, limit=3):
                self.limit, self.waited = limit, 0

            def state(self):
                return {"args": {"limit": self.limit}, "attributes": {"waited": self.waited}}
    """

    def state(self) -> dict[str, Any]:
        raise NotImplementedError(
            f"{type(self).__name__} is an ExportableState, so it must define state(), returning "
            '{"args": {constructor arguments}, "attributes": {attributes to restore}}.'
        )

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Any:
        """Build an instance from what `state()` returned."""
        instance = cls(**state.get("args", {}))
        for name, value in state.get("attributes", {}).items():
            setattr(instance, name, value)
        return instance


@dataclass
class TrainerState:
    """The progress of a run. A "step" is one optimizer update; a micro-batch of an accumulation is not a step.

    Saved as `trainer_state.json` in every checkpoint. Other implementations read the same file; fields that only ours
    has are in `loop_state.json`.
    """

    epoch: float | None = None  # passes over the data, with fraction; None outside training
    global_step: int = 0  # updates done
    max_steps: int = 0  # updates this run will do
    logging_steps: float = 500  # updates between two log lines
    eval_steps: float = 500  # updates between two evaluations
    save_steps: float = 500  # updates between two checkpoints
    train_batch_size: int | None = None  # samples per micro-batch and process
    num_train_epochs: int = 0  # passes over the data this run will start
    num_input_tokens_seen: int = 0  # tokens, over all processes
    total_flos: float = 0  # floating-point operations since the start; a float because an int64 would overflow
    log_history: list[dict[str, Any]] = field(default_factory=list)  # one dict per log line
    best_metric: float | None = None  # value of `metric_for_best_model`
    best_global_step: int | None = None  # update at which it was reached
    best_model_checkpoint: str | None = None  # directory that holds it
    is_local_process_zero: bool = True  # first process of this machine
    is_world_process_zero: bool = True  # first process of all
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, str | float | int | bool] | None = None
    # Name of the class -> what its state() returned; a list of those where several callbacks share a class.
    stateful_callbacks: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        # No fields: they are never saved, compared or printed.
        self._log_text = LogText(self._warn_of_changed)
        self._named: set[str] = set()  # keys of log lines that a warning has named
        self.places_of_checkpoints: tuple[str, ...] = ()  # further directories that may hold the best checkpoint
        self.training_id: str | None = None  # the same in a resumed training, another one in all others
        if self.log_history is None:
            self.log_history = []
        if self.stateful_callbacks is None:
            self.stateful_callbacks = {}
        elif not isinstance(self.stateful_callbacks, dict):
            self.stateful_callbacks = exported_states(self.stateful_callbacks)

    def add_log_line(self, line: Mapping[Any, Any]) -> dict[str, Any]:
        """Append `line` to `log_history`, with values that JSON holds; returns that. Where it had others, a warning
        names the key, once.
        """
        plain, changed = plain_line(line)
        if changed and self.is_world_process_zero:
            self._warn_of_changed(changed)
        self.log_history.append(plain)
        return plain

    def _warn_of_changed(self, changed: Mapping[str, str]) -> None:
        for name, what in changed.items():
            if name not in self._named:
                self._named.add(name)
                logger.warning(
                    "The value logged as %r is %s: the history has it as a list or a text, which no curve shows. Log "
                    "numbers: a mean, or each element under a separate name. Said once for each name.",
                    name,
                    what,
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; `log_history` is shared, not copied, because it can be long."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def to_json(self) -> str:
        """All fields as JSON, as `save_to_json` writes it. Only new and changed lines of the log are encoded."""
        return b"".join(self.text_parts()[:3]).decode()

    def text_parts(self, *, thoroughly: bool = True) -> StateText:
        """`to_json` in parts; without `thoroughly`, not all lines of a long log are compared again (`LogText`)."""
        rest = json.dumps(self.to_dict() | {"log_history": []}, indent=2, sort_keys=True, default=plain_value)
        # Only a field has this indent, and inside a JSON string a line break is escaped.
        head, _, tail = rest.partition(_EMPTY_LOG)
        lines = self.log_history if isinstance(self.log_history, list) else list(self.log_history)
        log = self._log_text.update(lines, thoroughly=thoroughly)
        end = self._log_text.closing + f"{tail}\n".encode()
        return StateText(f"{head}{_EMPTY_LOG[:-2]}".encode(), log, end, (self._log_text, self._log_text.num_rewritten))

    @classmethod
    def overrides_json(cls) -> bool:
        """Whether a subclass writes the file by a `save_to_json` or `to_json` that is not the one here."""
        return cls.save_to_json is not TrainerState.save_to_json or cls.to_json is not TrainerState.to_json

    def save_to_json(self, json_path: str | os.PathLike[str]) -> None:
        """Write every field to `json_path` as JSON."""
        write_bytes(json_path, self.to_json().encode())

    @classmethod
    def load_from_json(cls, json_path: str | os.PathLike[str]) -> TrainerState:
        """Read what `save_to_json`, of this or another implementation, wrote. Unknown fields are ignored. Raises
        ValueError naming the file and the field whose value is invalid.
        """
        # A file that its user names may be a link, as those in the cache of the hub are.
        values = read_trainer_state(os.path.realpath(json_path))
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def compute_steps(self, args: Any, max_steps: int) -> None:
        """Set the three intervals from `args`; a value below 1 is a fraction of `max_steps`, rounded up."""
        for name in ("logging_steps", "eval_steps", "save_steps"):
            interval = getattr(args, name, None)
            if interval is not None:
                setattr(self, name, interval_in_steps(interval, max_steps))

    def init_training_references(self, trainer: Any, max_steps: int, num_train_epochs: int, trial: Any = None) -> None:
        """Set what is known when a run starts: its length, its intervals, its trial, the rank of this process."""
        self.max_steps = max_steps
        self.num_train_epochs = num_train_epochs
        self.train_batch_size = trainer._train_batch_size
        self.is_local_process_zero = trainer.is_local_process_zero()
        self.is_world_process_zero = trainer.is_world_process_zero()
        self.compute_steps(trainer.args, max_steps)
        self.trial_name = trainer.hp_name(trial) if trial is not None and trainer.hp_name is not None else None
        self.trial_params = trial_params(trial)


def trial_params(trial: Any) -> dict[str, Any] | None:
    """The hyper-parameters of a trial: of an Optuna trial (`trial.params`), or of a plain dict; None without a
    trial.
    """
    if trial is None:
        return None
    return dict(getattr(trial, "params", trial))


def interval_in_steps(interval: float, max_steps: int) -> int:
    """Steps between two events; an `interval` in (0, 1) is a fraction of `max_steps`, rounded up.

    >>> interval_in_steps(0.3, 10), interval_in_steps(25, 10)
    (3, 25)
    """
    if 0 < interval < 1:
        # Rounded first, because 0.07 * 100 is 7.000000000000001 in binary and must not become 8.
        return max(1, -int(-round(max_steps * interval, 6) // 1))
    return int(interval)


def exported_states(objects: Iterable[Any]) -> dict[str, Any]:
    """Class name -> `state()` of each ExportableState among `objects`; a list of states where a class occurs twice."""
    states: dict[str, Any] = {}
    for item in objects:
        if not isinstance(item, ExportableState) and not hasattr(item, "state"):
            raise TypeError(
                f"{type(item).__name__} has no state(): a stateful callback must inherit from ExportableState."
            )
        name = type(item).__name__
        if name not in states:
            states[name] = item.state()
        elif isinstance(states[name], list):
            states[name].append(item.state())
        else:
            states[name] = [states[name], item.state()]
    return states


@dataclass
class TrainerControl(ExportableState):
    """Flags that callbacks set; the loop acts on them and resets them."""

    should_training_stop: bool = False  # end training after this step; never reset during a run
    should_epoch_stop: bool = False  # go to the next epoch; reset at its start
    should_save: bool = False  # write a checkpoint after this step; reset at the next
    should_evaluate: bool = False  # evaluate after this step; reset at the next
    should_log: bool = False  # write a log line after this step; reset at the next

    def _new_training(self) -> None:
        self.should_training_stop = False

    def _new_epoch(self) -> None:
        self.should_epoch_stop = False

    def _new_step(self) -> None:
        self.should_save = False
        self.should_evaluate = False
        self.should_log = False

    def state(self) -> dict[str, Any]:
        return {"args": {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "attributes": {}}
