"""Dispatches events to the callbacks of a run that override them.

Owns: the list of callbacks, the dispatch table, the reset of `control` before an event, obeying what a callback
returns, and the callbacks' states for a checkpoint. Leaves to others: when an event happens (the loop; order in
`base`).
Source: seed 000 (what a callback receives), seed 003 (which field of `control` an event resets).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from trainwright.callbacks.base import EVENTS, TrainerCallback
from trainwright.checkpoint.paths import named
from trainwright.interop.signatures import warn_of_events
from trainwright.names import closest
from trainwright.state import ExportableState, TrainerControl, TrainerState, exported_states

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

EVENT_KEYWORDS = {"on_log": "logs", "on_evaluate": "metrics", "on_predict": "metrics", "on_save": "checkpoint_dir"}
# What other libraries call the events.
OTHER_NAMES = {
    "on_train_start": "on_train_begin",
    "on_fit_start": "on_train_begin",
    "on_fit_end": "on_train_end",
    "on_epoch_start": "on_epoch_begin",
    "on_train_epoch_start": "on_epoch_begin",
    "on_train_epoch_end": "on_epoch_end",
    "on_batch_begin": "on_step_begin",
    "on_batch_start": "on_step_begin",
    "on_train_batch_begin": "on_step_begin",
    "on_train_batch_start": "on_step_begin",
    "on_batch_end": "on_step_end",
    "on_train_batch_end": "on_step_end",
    "on_before_optimizer_step": "on_pre_optimizer_step",
    "on_validation_end": "on_evaluate",
    "on_validation_epoch_end": "on_evaluate",
    "on_test_end": "on_predict",
    "on_save_checkpoint": "on_save",
}
CONTROL_FIELDS = tuple(field.name for field in dataclasses.fields(TrainerControl))


class _Shared:
    """An attribute of the handler that callbacks receive by keyword. It lives in the prebuilt keywords alone, so that
    `handler.optimizer = ...` reaches the next event without building a dict per event."""

    def __init__(self, *keywords: str) -> None:
        self.keywords = keywords

    def __get__(self, handler: Any, owner: type | None = None) -> Any:
        return self if handler is None else handler._shared[self.keywords[0]]

    def __set__(self, handler: Any, value: Any) -> None:
        for keyword in self.keywords:
            handler._shared[keyword] = value


class CallbackHandler(TrainerCallback):
    """Holds the callbacks of a run and passes each event on to those that override it.

    `listeners` maps an event to the bound methods that override it. A loop may skip an event without listeners with
    `if handler.listeners["on_step_begin"]:`, and then resets `control` itself (`control._new_step()`).
    """

    model = _Shared("model")
    processing_class = _Shared("processing_class", "tokenizer")
    tokenizer = processing_class  # its older name
    optimizer = _Shared("optimizer")
    lr_scheduler = _Shared("lr_scheduler")
    train_dataloader = _Shared("train_dataloader")
    eval_dataloader = _Shared("eval_dataloader")

    def __init__(
        self,
        callbacks: Iterable[Any],
        model: nn.Module | None,
        processing_class: Any,
        optimizer: Optimizer | None,
        lr_scheduler: Any,
    ) -> None:
        self._shared: dict[str, Any] = {}
        self.model = model
        self.processing_class = processing_class
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.train_dataloader = None
        self.eval_dataloader = None
        self.callbacks: list[Any] = []
        self.listeners: dict[str, tuple[Callable[..., Any], ...]] = {}
        for callback in callbacks:
            self.add_callback(callback)
        self.refresh_listeners()
        if not any(base.__name__ == "DefaultFlowCallback" for item in self.callbacks for base in type(item).__mro__):
            logger.warning(
                "There is no DefaultFlowCallback among the callbacks (%s), so nothing asks for logs, evaluations, "
                "checkpoints and the end of training. Unless a callback of yours does, add it: "
                "trainer.add_callback(DefaultFlowCallback).",
                ", ".join(self.callback_list.split()) or "none",
            )

    @property
    def callback_list(self) -> str:
        """The class names of the callbacks, one per line."""
        return "\n".join(type(callback).__name__ for callback in self.callbacks)

    def add_callback(self, callback: Any) -> None:
        """Append a callback, given as an instance or as a class that can be constructed without arguments."""
        instance = _constructed(callback) if isinstance(callback, type) else callback
        if not any(callable(getattr(instance, event, None)) for event in EVENTS):
            raise TypeError(
                f"callbacks: {callback!r} is not a callback, because it has none of the events ({', '.join(EVENTS)}). "
                "Pass an instance or a subclass of TrainerCallback."
            )
        if not type(instance).__module__.startswith("trainwright."):
            keywords = {event: [*self._shared, *filter(None, [EVENT_KEYWORDS.get(event)])] for event in EVENTS}
            _warn_of_near_events(instance)
            warn_of_events(instance, [event for event in EVENTS if _listens(instance, event)], keywords)
        if any(type(present) is type(instance) for present in self.callbacks):
            logger.warning(
                f"A callback {type(instance)} is added, but there is already one, and both will be called. The "
                f"callbacks were: {', '.join(self.callback_list.split())}."
            )
        self.callbacks.append(instance)
        self.refresh_listeners()

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback and return it; None when it is not there. A class means the first instance of it."""
        for position, present in enumerate(self.callbacks):
            if _is_meant(present, callback):
                del self.callbacks[position]
                self.refresh_listeners()
                return present
        return None

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, given as an instance or a class; nothing happens when it is not there."""
        self.pop_callback(callback)

    def refresh_listeners(self) -> None:
        """Rebuild the dispatch table. Needed only after an event was assigned on a callback that is already added."""
        self._listed = list(self.callbacks)
        self.listeners = {event: self._listeners_of(event) for event in EVENTS}

    def _listeners_of(self, event: str) -> tuple[Callable[..., Any], ...]:
        return tuple(getattr(callback, event) for callback in self.callbacks if _listens(callback, event))

    def call_event(
        self, event: str, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Call the listeners of `event` and return the resulting control.

        An event that is not in `EVENTS` reaches the callbacks that define a method of that name.
        """
        if self.callbacks != self._listed:  # the list itself was changed, as extensions do
            self.refresh_listeners()
        listeners = self.listeners.get(event)
        if listeners is None:
            listeners = self._listeners_of(event)
            if not listeners:
                raise ValueError(f"No callback has an event named {event!r}.{closest(event, EVENTS)}")
        keywords = {**self._shared, **kwargs} if kwargs else self._shared
        for listener in listeners:
            answer = listener(args, state, control, **keywords)
            if answer is not None and answer is not control:
                control = _obeyed(answer, control, listener, event)
        return control

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return self.call_event("on_init_end", args, state, control, **kwargs)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_training_stop = False
        return self.call_event("on_train_begin", args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return self.call_event("on_train_end", args, state, control, **kwargs)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_epoch_stop = False
        return self.call_event("on_epoch_begin", args, state, control, **kwargs)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return self.call_event("on_epoch_end", args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_log = control.should_evaluate = control.should_save = False
        return self.call_event("on_step_begin", args, state, control, **kwargs)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self.call_event("on_pre_optimizer_step", args, state, control, **kwargs)

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self.call_event("on_optimizer_step", args, state, control, **kwargs)

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return self.call_event("on_substep_end", args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return self.call_event("on_step_end", args, state, control, **kwargs)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> TrainerControl:
        control.should_evaluate = False
        return self.call_event("on_evaluate", args, state, control, metrics=metrics, **kwargs)

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> TrainerControl:
        return self.call_event("on_predict", args, state, control, metrics=metrics, **kwargs)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_save = False
        return self.call_event("on_save", args, state, control, **kwargs)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = False
        return self.call_event("on_log", args, state, control, logs=logs, **kwargs)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self.call_event("on_prediction_step", args, state, control, **kwargs)

    def on_push_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return self.call_event("on_push_begin", args, state, control, **kwargs)


def _constructed(callback_class: type) -> Any:
    try:
        return callback_class()
    except TypeError as error:
        raise TypeError(
            f"callbacks: {callback_class.__name__} cannot be constructed without arguments ({error}). "
            f"Pass an instance: callbacks=[{callback_class.__name__}(...)]."
        ) from error


def _is_meant(present: Any, wanted: Any) -> bool:
    """Whether `wanted`, an instance or a class, means the callback `present`.

    A class of `transformers` also means ours of the same name, so that `remove_callback(transformers.PrinterCallback)`
    in a script that changed one import line is not silently without effect.
    """
    if not isinstance(wanted, type):
        return present is wanted
    return isinstance(present, wanted) or (_is_reference(wanted) and type(present).__name__ == wanted.__name__)


def _is_reference(class_: type) -> bool:
    return class_.__module__.partition(".")[0] == "transformers"


def _warn_of_near_events(callback: Any) -> None:
    """Say which methods look like an event and are none, so that nothing calls them."""
    for name in dir(type(callback)):
        if not name.startswith("on_") or name in EVENTS or not callable(getattr(type(callback), name, None)):
            continue
        meant = f" Did you mean {OTHER_NAMES[name]!r}?" if name in OTHER_NAMES else closest(name, EVENTS)
        if meant:
            logger.warning(
                "%s.%s is no event, so the Trainer does not call it.%s", type(callback).__name__, name, meant
            )


def _listens(callback: Any, event: str) -> bool:
    """Whether `callback` has a method named `event` that is not the empty one of the base class."""
    if not callable(getattr(callback, event, None)):
        return False
    if event in getattr(callback, "__dict__", ()):
        return True
    owner = next((base for base in type(callback).__mro__ if event in vars(base)), None)
    if owner is None or owner is TrainerCallback:
        return owner is None  # None: a proxy that answers through __getattr__
    return not (owner.__name__ == "TrainerCallback" and _is_reference(owner))


def _obeyed(answer: Any, control: TrainerControl, listener: Callable[..., Any], event: str) -> TrainerControl:
    """The control after a callback answered with another control or with a dict of fields."""
    if isinstance(answer, dict):
        for name, value in answer.items():
            if name not in CONTROL_FIELDS:
                raise ValueError(
                    f"{_name_of(listener)}.{event} returned a dict with the key {name!r}, which is no field of "
                    f"TrainerControl; its fields are {', '.join(CONTROL_FIELDS)}.{closest(name, CONTROL_FIELDS)}"
                )
            setattr(control, name, bool(value))
        return control
    if all(hasattr(answer, name) for name in CONTROL_FIELDS):
        return answer  # type: ignore[no-any-return]  # a TrainerControl, ours or of another library
    raise TypeError(
        f"{_name_of(listener)}.{event} returned {answer!r}. A callback returns None, the control, or a dict of its "
        "fields such as {'should_training_stop': True}."
    )


def _name_of(listener: Callable[..., Any]) -> str:
    owner = getattr(listener, "__self__", None)
    return type(owner).__name__ if owner is not None else repr(listener)


# -- states of callbacks, in a checkpoint ------------------------------------------------------------------------------


def exported_callbacks(handler: CallbackHandler, control: TrainerControl) -> dict[str, Any]:
    """The states of the callbacks that have one, and of `control`, for `TrainerState.stateful_callbacks`."""
    return exported_states(item for item in [*handler.callbacks, control] if isinstance(item, ExportableState))


def _warn_of_lost_states(handler: CallbackHandler, saved: dict[str, Any]) -> None:
    """Name the callbacks whose state the checkpoint holds, and that this run has not, or has fewer times."""
    present = [type(item).__name__ for item in handler.callbacks if isinstance(item, ExportableState)]
    lost = []
    for name, states in saved.items():
        count = len(states) if isinstance(states, list) else 1
        if name != TrainerControl.__name__ and present.count(name) < count:
            lost.append(f"{name} ({present.count(name)} of {count})" if count > 1 and name in present else name)
    if lost:
        logger.warning(
            "The checkpoint holds the state of callbacks that this Trainer does not have: %s. Unless they are passed "
            "in callbacks=, they do not run, and checkpoints from here on are without their state.",
            named(lost),
        )


def restore_callbacks(handler: CallbackHandler, saved: dict[str, Any], *, replace: bool) -> None:
    """Give the callbacks the state they had: what they counted (attributes) always; with `replace`
    (`restore_callback_states_from_checkpoint`) also what they were constructed with."""
    _warn_of_lost_states(handler, saved)
    seen: dict[str, int] = {}
    for number, callback in enumerate(handler.callbacks):
        name = type(callback).__name__
        if not isinstance(callback, ExportableState) or name not in saved:
            continue
        states = saved[name] if isinstance(saved[name], list) else [saved[name]]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > len(states):
            continue
        state = states[seen[name] - 1]
        # Only what the callback itself calls its state: a file must not choose which attributes are set.
        known = callback.state().get("attributes", {})
        attributes = {
            attribute: value for attribute, value in state.get("attributes", {}).items() if attribute in known
        }
        if replace:
            handler.callbacks[number] = type(callback).from_state({**state, "attributes": attributes})
        else:
            for attribute, value in attributes.items():
                setattr(callback, attribute, value)
    handler.refresh_listeners()
