"""Compatibility of overrides written for older releases.

Owns: inspecting, once, which arguments a user's override takes, and calling it with those; the arguments that each hook
gained over the releases (`GAINED`). Leaves to others: calling the hooks (`trainer.py`).
Source: seeds 003 and 004 show overrides of three generations.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

# Hook -> arguments it gained in later releases; an override that does not take one is called without it.
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
    """`function` itself when it takes all of `newer`, else a wrapper that drops those it does not take.

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
    """Let overrides of methods of `base` require arguments that these have defaults for: where a call omits one, they
    get that default, or what `values[method][argument]` returns. Other methods are not wrapped.
    """
    for name, original in vars(base).items():
        if not inspect.isfunction(original) or name.startswith("__"):
            continue
        method = getattr(instance, name)
        if getattr(method, "__func__", method) is original:
            continue
        if left_out := _defaults_left_out(method, original):
            given = {argument: values.get(name, {}).get(of, lambda v=v: v) for argument, of, v in left_out}  # type: ignore[misc]
            setattr(instance, name, _filled(method, given))


def _defaults_left_out(method: Callable[..., Any], original: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    """Arguments that `method` requires and `original`, which it overrides, has a default for: its name in each, and the
    default. An argument with another name is matched by position.
    """
    signature = _signature_of(method)
    if signature is None:
        return []
    parameters = list(inspect.signature(original).parameters.values())[1:]  # without self
    named = {parameter.name: parameter for parameter in parameters}
    found = []
    for place, parameter in enumerate(signature.parameters.values()):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        same = named.get(parameter.name)
        if same is None and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and place < len(parameters):
            same = parameters[place]
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

    To be called before `give_defaults`, whose wrappers take anything. Raises TypeError naming the method, its arguments
    and those of the call.
    """
    for name, needed in CALLED_WITH.items():
        method = getattr(instance, name)
        if getattr(method, "__func__", method) is getattr(base, name):
            continue
        signature = _signature_of(method)
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
    """Warn of an event of a callback that cannot be called, before training. No error, since it may never be called:
    sentence-transformers has one that only itself calls.

    `keywords`: of each event, its keyword arguments after args, state and control.
    """
    for event in events:
        method = getattr(callback, event)
        signature = _signature_of(method)
        if signature is None:
            continue
        try:
            signature.bind("args", "state", "control", **dict.fromkeys(keywords[event]))
        except TypeError as error:
            logger.warning(
                "%s.%s%s%s cannot be called with args, state, control and the keywords %s: %s. A run that reaches it "
                "will fail there. Write def %s(self, args, state, control, **kwargs).",
                type(callback).__name__,
                event,
                signature,
                _place_of(method),
                list(keywords[event]),
                error,
                event,
            )


def _signature_of(method: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of `method` itself: of a decorator's wrapper, not of what it wraps. None where it has none."""
    try:
        return inspect.signature(method, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


def _place_of(method: Callable[..., Any]) -> str:
    """` (file:line)`, or "" where there is no source."""
    code = getattr(inspect.unwrap(getattr(method, "__func__", method)), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
