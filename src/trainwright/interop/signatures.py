"""Overrides written for older releases keep working.

Owns: finding out, once, which arguments a user's override takes, and calling it with those. Leaves to others: which
arguments each hook gained over the years (`GAINED`, below, is that list; `trainer.py` asks).
Source: seeds 003 and 004 show overrides of three generations.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

# Hook -> arguments it gained after some releases; an override without room for one is called without it.
GAINED: dict[str, tuple[str, ...]] = {
    "compute_loss": ("num_items_in_batch",),
    "training_step": ("num_items_in_batch",),
    "log": ("start_time",),
    "get_batch_samples": ("device",),
    "_get_train_sampler": ("train_dataset",),
    "_maybe_log_save_evaluate": ("grad_norm", "start_time", "learning_rate"),
    "_load_from_checkpoint": ("model",),
    "_evaluate": ("skip_scheduler",),
    "create_optimizer": ("model",),
    "create_scheduler": ("optimizer",),
}

# Hook -> positional arguments it is called with; an override that cannot take them can never work.
CALLED_WITH: dict[str, tuple[str, ...]] = {
    "compute_loss": ("model", "inputs"),
    "training_step": ("model", "inputs"),
    "prediction_step": ("model", "inputs", "prediction_loss_only"),
    "log": ("logs",),
    "create_scheduler": ("num_training_steps",),
    "create_optimizer_and_scheduler": ("num_training_steps",),
    "_save_checkpoint": ("model", "trial"),
    "_prepare_inputs": ("inputs",),
    "get_eval_dataloader": (),
    "get_train_dataloader": (),
    "create_optimizer": (),
    "_set_signature_columns_if_needed": (),
}

# Of the arguments a hook gained, those that every call passes: an override may take them without a default.
ALWAYS_GIVEN: dict[str, tuple[str, ...]] = {"training_step": ("num_items_in_batch",)}


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` can be called with the keyword `name`. True for what has no readable signature (C
    functions).
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    if name in parameters:
        return parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def compatible(function: Callable[..., Any], newer: Iterable[str]) -> Callable[..., Any]:
    """`function` itself when it takes all of `newer`, else a wrapper that withholds those it has no room for.

    The signature is read here, once; the wrapper costs one extra call.
    """
    missing = frozenset(name for name in newer if not accepts(function, name))
    if not missing:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{name: value for name, value in kwargs.items() if name not in missing})

    return call


def give_defaults(instance: Any, base: type, values: Mapping[str, Mapping[str, Callable[[], Any]]]) -> None:
    """Let overrides of methods of `base` demand arguments that these have defaults for: where a call leaves one out,
    they get that default, or what `values[method][argument]` returns. The rest stay as they are, and cost nothing.
    """
    for name, own in vars(base).items():
        if not inspect.isfunction(own) or name.startswith("__"):
            continue
        method = getattr(instance, name)
        if getattr(method, "__func__", method) is own:
            continue
        if left_out := _defaults_left_out(method, own):
            given = {argument: values.get(name, {}).get(of, lambda v=v: v) for argument, of, v in left_out}  # type: ignore[misc]
            setattr(instance, name, _filled(method, given))


def _defaults_left_out(method: Callable[..., Any], own: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    """Arguments that `method` demands and `own`, which it overrides, has a default for: its name here, there, and the
    default. An argument with another name is told by its place.
    """
    signature = _taken_by(method)
    if signature is None:
        return []
    of_own = list(inspect.signature(own).parameters.values())[1:]  # without self
    named = {parameter.name: parameter for parameter in of_own}
    found = []
    for place, parameter in enumerate(signature.parameters.values()):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        same = named.get(parameter.name)
        if same is None and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and place < len(of_own):
            same = of_own[place]
        if parameter.default is parameter.empty and same is not None and same.default is not same.empty:
            found.append((parameter.name, same.name, same.default))
    return found


def _filled(method: Callable[..., Any], given: Mapping[str, Callable[[], Any]]) -> Callable[..., Any]:
    signature = inspect.signature(method, follow_wrapped=False)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        known = signature.bind_partial(*args, **kwargs).arguments
        return method(*args, **kwargs, **{name: value() for name, value in given.items() if name not in known})

    return call


def check_overrides(instance: Any, base: type) -> None:
    """Report an override that can never be called, with its file and line, before any work is done.

    To be called before `give_defaults`, whose methods take anything. Raises TypeError naming the method, what it takes
    and what it is called with.
    """
    for name, needed in CALLED_WITH.items():
        method = getattr(instance, name)
        if getattr(method, "__func__", method) is getattr(base, name):
            continue
        signature = _taken_by(method)
        if signature is None:
            continue
        given = {newer: newer for newer in ALWAYS_GIVEN.get(name, ()) if accepts(method, newer)}
        given.update({argument: of for argument, of, _ in _defaults_left_out(method, getattr(base, name))})
        try:
            signature.bind(*needed, **given)
        except TypeError as error:
            called = ", ".join(needed)
            raise TypeError(
                f"{type(instance).__name__}.{name}{signature}{_place_of(method)} cannot be called as {name}({called}): "
                f"{error}. Give it the arguments ({called}), or accept *args, **kwargs."
            ) from None


def warn_of_events(callback: Any, events: Iterable[str], keywords: Mapping[str, Iterable[str]]) -> None:
    """Warn of an event of a callback that cannot be called: now, not hours later at the first save. No error, since it
    may never be: sentence-transformers has one that is called by nobody but itself.

    `keywords`: of each event, what it is called with behind args, state and control.
    """
    for event in events:
        method = getattr(callback, event)
        signature = _taken_by(method)
        if signature is None:
            continue
        try:
            signature.bind("args", "state", "control", **dict.fromkeys(keywords[event]))
        except TypeError as error:
            logger.warning(
                "%s.%s%s%s cannot be called with args, state, control and the keywords %s: %s. A run that comes to it "
                "will end there. Write def %s(self, args, state, control, **kwargs).",
                type(callback).__name__,
                event,
                signature,
                _place_of(method),
                list(keywords[event]),
                error,
                event,
            )


def _taken_by(method: Callable[..., Any]) -> inspect.Signature | None:
    """What can be passed to `method`: to a decorator's wrapper, not to what it wraps. None where that is unreadable."""
    try:
        return inspect.signature(method, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


def _place_of(method: Callable[..., Any]) -> str:
    """` (file:line)`, or "" where there is no source."""
    code = getattr(inspect.unwrap(getattr(method, "__func__", method)), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
