"""What is searched when nothing else is asked for, and what is optimised.

Owns: the default space of each engine and `default_compute_objective`. Leaves to others: running the search.
Source: seed 001 (`hyperparameter_search`); ranges as the installed releases return them.
"""

from __future__ import annotations

import re
from typing import Any

from trainwright.interop.optional import require

BATCH_SIZES = (4, 8, 16, 32, 64)

# What an evaluation reports about itself rather than about the model. The reference counts start-up time and memory
# into the objective; that makes the best trial depend on the machine, so they are left out here.
_ABOUT_THE_RUN = re.compile(r"(^epoch|_runtime|_per_second|_compilation_time|_preparation_time|_mem_[cg]pu(_\w+)?)$")


def default_compute_objective(metrics: dict[str, float]) -> float:
    """The number to optimise: the evaluation loss, or the sum of all other metrics where there are any.

    Epoch, times, speeds and memory are no metrics. Leaves `metrics` as it is.

    >>> default_compute_objective({"eval_loss": 0.5, "eval_runtime": 2.0, "epoch": 1.0})
    0.5
    >>> default_compute_objective({"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_f1": 0.5})
    1.25
    """
    scores = [value for name, value in metrics.items() if name != "eval_loss" and not _ABOUT_THE_RUN.search(name)]
    if scores:
        return sum(scores)
    if metrics.get("eval_loss") is None:
        raise ValueError(
            f"There is nothing to optimise: the evaluation returned {sorted(metrics)}, neither eval_loss nor another "
            "metric. Give the evaluation data labels, or pass compute_objective= to hyperparameter_search."
        )
    return metrics["eval_loss"]


def default_hp_space_optuna(trial: Any) -> dict[str, float]:
    """Learning rate, epochs, seed and batch size of one Optuna `trial`."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 1, 5),
        "seed": trial.suggest_int("seed", 1, 40),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", list(BATCH_SIZES)),
    }


def default_hp_space_ray(trial: Any = None) -> dict[str, Any]:
    """The same space as Ray Tune distributions; `trial` is not used."""
    tune = require("ray.tune", "default_hp_space_ray", package="ray[tune]", extra="ray")
    return {
        "learning_rate": tune.loguniform(1e-6, 1e-4),
        "num_train_epochs": tune.choice(list(range(1, 6))),
        "seed": tune.randint(1, 41),  # whole numbers; the upper end is exclusive
        "per_device_train_batch_size": tune.choice(list(BATCH_SIZES)),
    }


def default_hp_space_wandb(trial: Any = None) -> dict[str, Any]:
    """A random sweep over about the same space, as W&B writes one; `trial` is not used."""
    return {
        "method": "random",
        "metric": {"name": "objective", "goal": "minimize"},
        "parameters": {
            "learning_rate": {"distribution": "uniform", "min": 1e-6, "max": 1e-4},
            "num_train_epochs": {"distribution": "int_uniform", "min": 1, "max": 6},
            "seed": {"distribution": "int_uniform", "min": 1, "max": 40},
            "per_device_train_batch_size": {"values": list(BATCH_SIZES)},
        },
    }


def default_hp_space_sigopt(trial: Any = None) -> list[dict[str, Any]]:
    """The space in SigOpt's notation, for scripts that still build one; the service itself is gone."""
    return [
        {"name": "learning_rate", "type": "double", "bounds": {"min": 1e-6, "max": 1e-4}, "transformation": "log"},
        {"name": "num_train_epochs", "type": "int", "bounds": {"min": 1, "max": 6}},
        {"name": "seed", "type": "int", "bounds": {"min": 1, "max": 40}},
        {
            "name": "per_device_train_batch_size",
            "type": "categorical",
            "categorical_values": [str(size) for size in BATCH_SIZES],
        },
    ]
