"""Documented functions and tables of the Trainer's modules that nothing here needs; scripts import them.

Owns: thin wrappers over the shelves. Leaves to others: the shelves; `replaced_names.py` lists the module of each.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from trainwright.argtypes import FALSE_WORDS, TRUE_WORDS
from trainwright.callbacks.flow import DefaultFlowCallback
from trainwright.evaluation import metrics as metric_text
from trainwright.interop.models import base_model_of
from trainwright.interop.trackers import TRACKERS, installed_trackers
from trainwright.run.resume import report_changes
from trainwright.tracking.base import tracker_class

DEFAULT_CALLBACKS = [DefaultFlowCallback]  # progress and trackers are added by the arguments


# -- training_args, integrations -------------------------------------------------------------------------------------


def default_logdir() -> str:
    """Where TensorBoard writes by default: `runs/<moment>_<machine>`."""
    return os.path.join("runs", f"{datetime.datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}")


def get_int_from_env(env_keys: Iterable[str], default: int) -> int:
    """The first of the environment variables that holds a number of 0 or more; else `default`."""
    for key in env_keys:
        value = int(os.environ.get(key, -1))
        if value >= 0:
            return value
    return default


def str_to_bool(value: str, to_bool: bool = True) -> int | bool:
    """True or False (1 or 0 with `to_bool=False`) for "yes", "true", "t", "y", "1", "on" and their opposites."""
    word = value.lower()
    if word in (*TRUE_WORDS, "on"):
        return True if to_bool else 1
    if word in (*FALSE_WORDS, "off"):
        return False if to_bool else 0
    raise ValueError(f"{value!r} is neither true nor false; write one of {', '.join((*TRUE_WORDS, *FALSE_WORDS))}.")


# -- trainer_utils, trainer_pt_utils ---------------------------------------------------------------------------------


def compare_trainer_and_checkpoint_args(training_args: Any, trainer_state: Any) -> None:
    """Warn of settings that differ between the arguments and the state of a checkpoint."""
    report_changes(training_args, trainer_state, training_args.train_batch_size)


def unwrap_peft_model(model: object) -> Any:
    """The model inside a peft wrapper; any other model itself."""
    return base_model_of(model)


def metrics_format(*trainer_and_metrics: Any) -> dict[str, Any]:
    """The metrics in human units. Up to 4.x a trainer came before them, which was not used."""
    return metric_text.metrics_format(trainer_and_metrics[-1])


# -- hf_argparser ----------------------------------------------------------------------------------------------------


def string_to_bool(v: Any) -> bool:
    """A flag's text as bool; raises argparse's error, so that a parser shows it."""
    import argparse

    if isinstance(v, bool):
        return v
    if v.lower() not in (*TRUE_WORDS, *FALSE_WORDS):
        allowed = "/".join((*TRUE_WORDS, *FALSE_WORDS))
        raise argparse.ArgumentTypeError(f"{v!r} is neither true nor false; write one of {allowed}.")
    return v.lower() in TRUE_WORDS


def make_choice_type_function(choices: list[Any]) -> Callable[[str], Any]:
    """A `type=` of argparse that turns text into the choice that is written so, and leaves other text as it is."""
    by_text = {str(choice): choice for choice in choices}
    return lambda text: by_text.get(text, text)


# -- integrations ----------------------------------------------------------------------------------------------------


def get_available_reporting_integrations() -> list[str]:
    """The trackers that are installed: the meaning of `report_to="all"`."""
    return installed_trackers()


class _ByTracker(Mapping[str, type[Any]]):
    """Tracker -> its callback class, whose file is imported when it is read."""

    def __getitem__(self, name: str) -> type[Any]:
        if name not in TRACKERS:
            raise KeyError(name)
        return tracker_class(name)

    def __iter__(self) -> Iterator[str]:
        return iter(TRACKERS)

    def __len__(self) -> int:
        return len(TRACKERS)


INTEGRATION_TO_CALLBACK: Mapping[str, type[Any]] = _ByTracker()


def _search_with(backend: str) -> Callable[..., Any]:
    def run_hp_search(trainer: Any, n_trials: int, direction: str | Sequence[str], **kwargs: Any) -> Any:
        return trainer.hyperparameter_search(n_trials=n_trials, direction=direction, backend=backend, **kwargs)

    run_hp_search.__name__ = run_hp_search.__qualname__ = f"run_hp_search_{backend}"
    run_hp_search.__doc__ = f"`trainer.hyperparameter_search(backend={backend!r})`."
    return run_hp_search


run_hp_search_optuna = _search_with("optuna")
run_hp_search_ray = _search_with("ray")
run_hp_search_sigopt = _search_with("sigopt")
run_hp_search_wandb = _search_with("wandb")
