"""Hyper-parameter search with Ray Tune.

Owns: the Tune run, its resources, results and checkpoints. Leaves to others: training a trial.
Each trial runs in a process of Ray's own, on a copy of everything that `objective` refers to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from trainwright.checkpoint.layout import get_last_checkpoint
from trainwright.interop.optional import require
from trainwright.outputs import BestRun
from trainwright.parallel.broadcast import world
from trainwright.report.trials import TrialRecord
from trainwright.search.backends import NamedTrial, Objective, SearchContext, check_directions, check_n_trials
from trainwright.search.failures import TrialFailed
from trainwright.search.spaces import default_hp_space_ray as default_hp_space

__all__ = ["default_hp_space", "params_of", "report", "run"]

logger = logging.getLogger(__name__)

# Schedulers that compare trials while they train, so they do nothing without evaluations during training.
_COMPARING = (
    "AsyncHyperBandScheduler",  # the class behind ASHAScheduler
    "HyperBandForBOHB",
    "HyperBandScheduler",
    "MedianStoppingRule",
    "PB2",
    "PopulationBasedTraining",
)


def _tune() -> Any:
    return require("ray.tune", "hyperparameter_search(backend='ray')", package="ray[tune]", extra="ray")


def params_of(trial: dict[str, Any], hp_space: Callable[[Any], Any]) -> dict[str, Any]:
    """The values that Tune chose for `trial`."""
    return dict(trial)


def report(
    trial: Any, value: Any, step: int, metrics: dict[str, float] | None = None, checkpoint_dir: str | None = None
) -> None:
    """Report the objective and `metrics` at `step`, with the `checkpoint-N` in `checkpoint_dir` where there is one.

    Tune copies the checkpoint to its storage before this returns, and may end the trial's process here.
    """
    tune = _tune()
    trial.last_reported = float(value)
    results = {**(metrics or {}), "objective": float(value), "step": step}
    tune.report(results, checkpoint=tune.Checkpoint.from_directory(checkpoint_dir) if checkpoint_dir else None)


def run(
    objective: Objective,
    n_trials: int,
    direction: str | Sequence[str],
    hp_space: Callable[[Any], Any] | None = None,
    context: SearchContext | None = None,
    **kwargs: Any,
) -> BestRun:
    """Run `n_trials` and return the best; `run_summary` of the result is Ray's `ExperimentAnalysis`.

    `kwargs` go to `ray.tune.run` (resources_per_trial, scheduler, search_alg, storage_path, stop, ...). A trial gets
    one CPU and `context.num_gpus` GPUs unless `resources_per_trial` says otherwise.
    """
    goal = check_directions(direction)[0]
    check_n_trials(n_trials)
    if world()[1] > 1:
        raise RuntimeError(
            f"hyperparameter_search(backend='ray') was called in {world()[1]} processes, but Ray starts its own. "
            "Start the script with plain python, or use backend='optuna', which searches with all processes together."
        )
    tune = _tune()
    context = context or SearchContext()
    mode = goal[:3]
    _check_scheduler(kwargs.get("scheduler"), context)
    _check_mode(kwargs, goal)
    if "resources_per_trial" not in kwargs:
        kwargs["resources_per_trial"] = {"cpu": 1, "gpu": context.num_gpus}
        logger.info("Each Ray trial gets %s; resources_per_trial= changes that.", kwargs["resources_per_trial"])
    if all(getattr(kwargs.get(part), "metric", None) is None for part in ("scheduler", "search_alg")):
        kwargs = {"metric": "objective", "mode": mode} | kwargs  # Ray refuses them where a scheduler has its own

    # Stored once and fetched by every trial, instead of travelling with each: it holds the data sets.
    trainable = tune.with_parameters(_train, objective=objective)
    space = (hp_space or default_hp_space)(None)
    analysis = tune.run(trainable, config=space, num_samples=n_trials, **kwargs)
    context.trials.extend(_record(trial, context.ray_scope, mode) for trial in analysis.trials)
    best = analysis.get_best_trial(metric="objective", mode=mode, scope=context.ray_scope)
    if best is None:
        raise RuntimeError(f"None of the {n_trials} Ray trials reported an objective (scope={context.ray_scope!r}).")
    value = _scoped_value(best, context.ray_scope, mode)
    return BestRun(best.trial_id, value, best.config, analysis)


def _train(config: dict[str, Any], objective: Objective) -> None:
    """One trial, in a process of Ray's."""
    tune = _tune()
    trial = NamedTrial(config, tune.get_context().get_trial_id())
    stored = tune.get_checkpoint()
    try:
        if stored is None:
            value = objective(trial)
        else:
            with stored.as_directory() as directory:
                value = objective(trial, get_last_checkpoint(directory))
    except TrialFailed:  # it is in the log; without a result Ray leaves the trial out, an error would end the search
        return
    if float(value) != trial.last_reported:
        tune.report({"objective": float(value)})


def _check_scheduler(scheduler: Any, context: SearchContext) -> None:
    if type(scheduler).__name__ in _COMPARING and not context.evaluates_while_training:
        raise ValueError(
            f"scheduler={type(scheduler).__name__} compares trials while they train, but nothing is evaluated during "
            "training. Set eval_strategy to 'steps' or 'epoch'."
        )


def _check_mode(kwargs: dict[str, Any], goal: str) -> None:
    """ValueError where Ray, its scheduler or its search algorithm are told to optimise in the other direction."""
    modes = {"mode": kwargs.get("mode")}
    for part in ("scheduler", "search_alg"):
        owner = kwargs.get(part)
        modes[f"the mode of {part}"] = getattr(owner, "_mode", None) or getattr(owner, "mode", None)
    for name, mode in modes.items():
        if mode in ("min", "max") and mode != goal[:3]:
            raise ValueError(f"direction={goal!r}, but {name} is {mode!r}: let both say the same.")


def _record(trial: Any, scope: str, mode: str) -> TrialRecord:
    is_complete = trial.status == "TERMINATED" and "objective" in trial.metric_analysis
    values = (_scoped_value(trial, scope, mode),) if is_complete else ()
    duration_s = trial.last_result.get("time_total_s") if trial.last_result else None
    return TrialRecord(trial.trial_id, "complete" if is_complete else "failed", values, dict(trial.config), duration_s)


def _scoped_value(trial: Any, scope: str, mode: str) -> float:
    """The value by which Ray chose `trial`: the best of its results where `scope` is "all", else what `scope` names."""
    return float(trial.metric_analysis["objective"][mode if scope == "all" else scope])
