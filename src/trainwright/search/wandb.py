"""Hyper-parameter search with W&B sweeps.

Owns: the sweep, its agent, and what each run logs about the objective. Leaves to others: training a trial, and all
other metrics (`tracking/wandb` logs them into the same run). The sweep server proposes the values, so it must be
reachable.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from trainwright.interop.optional import require
from trainwright.names import closest
from trainwright.outputs import BestRun
from trainwright.parallel.broadcast import announce, finish, follow, world
from trainwright.report.trials import TrialRecord
from trainwright.search.backends import NamedTrial, Objective, SearchContext, check_directions, check_n_trials
from trainwright.search.spaces import default_hp_space_wandb as default_hp_space

__all__ = ["default_hp_space", "params_of", "report", "run"]

logger = logging.getLogger(__name__)

OPTIONS = ("sweep_id", "project", "entity", "name", "metric")


def params_of(trial: dict[str, Any], hp_space: Callable[[Any], Any]) -> dict[str, Any]:
    """The values that the sweep chose for `trial`."""
    return dict(trial)


def report(
    trial: Any, value: Any, step: int, metrics: dict[str, float] | None = None, checkpoint_dir: str | None = None
) -> None:
    """Log the objective at `step` to the current run, for an `early_terminate` rule of the sweep."""
    wandb = require("wandb", "hyperparameter_search(backend='wandb')", extra="wandb")
    trial.last_reported = float(value)
    if wandb.run is not None:  # only process 0 has a run
        wandb.run.log({"objective": float(value), "train/global_step": step})


def run(
    objective: Objective,
    n_trials: int,
    direction: str | Sequence[str],
    hp_space: Callable[[Any], Any] | None = None,
    context: SearchContext | None = None,
    **kwargs: Any,
) -> BestRun:
    """Create a sweep, or join `sweep_id=`, and run `n_trials` of it; `run_summary` of the result is the sweep's id.

    `kwargs`: sweep_id, project, entity, name (of the sweep), metric (its name in the runs; default "objective").
    """
    wandb = require("wandb", "hyperparameter_search(backend='wandb')", extra="wandb")
    goal = check_directions(direction)[0]
    check_n_trials(n_trials)
    for option in kwargs:
        if option not in OPTIONS:
            raise TypeError(
                f"hyperparameter_search(backend='wandb') has no argument {option!r}; it takes {list(OPTIONS)}."
                f"{closest(option, OPTIONS)}"
            )
    if world()[0] != 0:

        def run_trial(trial: NamedTrial) -> None:
            try:
                objective(trial)
            except Exception as error:  # the agent of rank 0 continues after a failed trial, so this rank does too
                logger.warning("Trial %s failed: %s", trial.run_id, error)

        result: BestRun = follow(run_trial)
        return result

    metric = kwargs.get("metric") or "objective"
    project, entity = kwargs.get("project"), kwargs.get("entity")
    sweep_id = kwargs.get("sweep_id")
    if not sweep_id:
        sweep = _sweep_config((hp_space or default_hp_space)(None), kwargs.get("name"), metric, goal)
        sweep_id = wandb.sweep(sweep, project=project, entity=entity)
    finished: list[BestRun] = []
    trials = context.trials if context is not None else []
    failures: list[Exception] = []

    def train() -> None:
        # The agent prints the exception of a trial and continues; stored as the cause of a search without a result.
        with wandb.init() as current:
            trial = NamedTrial(dict(current.config), current.id)
            announce(trial)
            start = time.monotonic()
            try:
                value = float(objective(trial))
            except Exception as error:
                failures.append(error)
                trials.append(TrialRecord(current.id, "failed", (), dict(trial), time.monotonic() - start))
                raise
            trials.append(TrialRecord(current.id, "complete", (value,), dict(trial), time.monotonic() - start))
            if value != trial.last_reported or metric != "objective":
                current.log({metric: value})
            finished.append(BestRun(current.id, value, dict(trial), sweep_id))

    wandb.agent(sweep_id, function=train, count=n_trials, project=project, entity=entity)
    if not finished:
        raise RuntimeError(f"No trial of the sweep {sweep_id} completed.") from (failures[-1] if failures else None)
    pick = min if goal == "minimize" else max
    return finish(pick(finished, key=lambda best: best.objective))  # type: ignore[no-any-return]


def _sweep_config(space: Any, name: str | None, metric: str, goal: str) -> dict[str, Any]:
    """The sweep as W&B wants it: `space` with our metric and direction, which the caller's arguments decide."""
    if not isinstance(space, dict) or "parameters" not in space:
        raise ValueError(
            "hp_space must return a W&B sweep configuration for backend='wandb': a dict with the key 'parameters' "
            f"(and 'method'), not {space!r}."
        )
    config = {"method": "random", **space, "metric": {"name": metric, "goal": goal}}
    if name:
        config["name"] = name
    return config
