"""Hyper-parameter search with Optuna.

Owns: studies, pruning, several objectives, and sharing one trial among processes. Leaves to others: training a trial.
Optuna samples while a trial runs (`trial.suggest_float(...)` inside `hp_space`), so a trial is an object here. A trial
that fails by itself (failures.py) gets Optuna's state FAIL, which its samplers leave out.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from trainwright.interop.optional import require
from trainwright.names import closest, some
from trainwright.outputs import BestRun
from trainwright.parallel.broadcast import announce, finish, follow, share, world
from trainwright.report.trials import TrialRecord
from trainwright.search.backends import Objective, SearchContext, check_directions, check_n_trials
from trainwright.search.failures import TrialFailed
from trainwright.search.spaces import default_hp_space_optuna as default_hp_space

__all__ = ["SharedTrial", "default_hp_space", "params_of", "report", "run"]

logger = logging.getLogger(__name__)

TRIES_TO_CREATE, WAIT_TO_CREATE_S = 10, 0.5
_STORAGE_ERRORS = ("StorageInternalError", "DuplicatedStudyError")
_OURS = {"direction", "directions", "n_trials", "func", "self"}  # arguments that `run` fills itself


def params_of(trial: Any, hp_space: Callable[[Any], dict[str, Any] | None]) -> dict[str, Any]:
    """Sample `trial` from `hp_space`. The returned dict counts, so the function may add constants."""
    params = hp_space(trial)
    if params is None:
        return dict(trial.params)
    if not isinstance(params, dict):
        raise TypeError(f"hp_space must return a dict of hyper-parameters, not a {type(params).__name__}: {params!r}.")
    return params


def report(
    trial: Any, value: Any, step: int, metrics: dict[str, float] | None = None, checkpoint_dir: str | None = None
) -> None:
    """Report the objective at `step` to the pruner; raises `optuna.TrialPruned` where it prunes the trial.

    Optuna cannot prune by several objectives, so a list of values is not reported.
    """
    if isinstance(value, (list, tuple)):
        return
    trial.report(float(value), step)
    if trial.should_prune():
        optuna = require("optuna", "hyperparameter_search(backend='optuna')", extra="optuna")
        raise optuna.TrialPruned(f"trial {trial.number} was given up at step {step} with objective {float(value):.6g}")


def run(
    objective: Objective,
    n_trials: int,
    direction: str | Sequence[str],
    hp_space: Callable[[Any], Any] | None = None,
    context: SearchContext | None = None,
    **kwargs: Any,
) -> BestRun | list[BestRun]:
    """Run `n_trials` (more, where `load_if_exists=True` finds an earlier study) and return the best one.

    `kwargs` go to `optuna.create_study` (study_name, storage, sampler, pruner, load_if_exists) and `Study.optimize`
    (timeout in s, catch, callbacks, gc_after_trial, show_progress_bar). Several directions return the Pareto front.
    In a distributed run every rank calls this; rank 0 calls Optuna, and all return the same.
    """
    optuna = require("optuna", "hyperparameter_search(backend='optuna')", extra="optuna")
    directions = check_directions(direction, several=True)
    check_n_trials(n_trials)
    create, optimize = _split(kwargs, optuna)
    catch = optimize.get("catch", ())
    optimize["catch"] = (TrialFailed, *((catch,) if isinstance(catch, type) else tuple(catch)))
    tolerated = (optuna.TrialPruned, *optimize["catch"])
    rank, num_processes = world()

    if rank != 0:

        def run_trial(number: int) -> None:
            try:
                objective(SharedTrial(None, number))
            except tolerated as error:
                logger.debug("Trial %d ended early: %s", number, error)

        result: BestRun | list[BestRun] = follow(run_trial)
        return result

    numbers: set[int] = set()

    def train(trial: Any) -> Any:
        numbers.add(trial.number)
        if num_processes > 1:
            announce(trial.number)
            trial = SharedTrial(trial, trial.number)
        return _checked(objective(trial), directions)

    try:
        study = _study(optuna, directions, create)
    except Exception as error:
        finish(error)  # the other ranks wait for a trial
        raise
    try:
        study.optimize(train, n_trials=n_trials, **optimize)
    finally:
        if context is not None:
            context.trials.extend(_record(trial) for trial in study.trials)
    _warn_of_unfinished(study, numbers)
    _warn_of_another_space(study, numbers, directions)
    best = [
        BestRun(str(trial.number), trial.values if len(directions) > 1 else trial.values[0], trial.params)
        for trial in _best_trials(study, directions)
    ]
    return finish(best if len(directions) > 1 else best[0])  # type: ignore[no-any-return]


class SharedTrial:
    """An Optuna trial that several ranks train together: suggestions and pruning decisions are those of rank 0."""

    def __init__(self, trial: Any, number: int) -> None:
        self._trial = trial  # None on every rank but 0
        self.number = number
        self.params: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("suggest_"):
            raise AttributeError(
                f"A trial of a distributed search has no {name!r}: it offers suggest_*, params, number, report, "
                "should_prune and set_user_attr."
            )

        def suggest(key: str, *args: Any, **kwargs: Any) -> Any:
            if key not in self.params:
                value = None if self._trial is None else getattr(self._trial, name)(key, *args, **kwargs)
                self.params[key] = share(value)
            return self.params[key]

        return suggest

    def report(self, value: float, step: int) -> None:
        """Record an intermediate value."""
        if self._trial is not None:
            self._trial.report(value, step)

    def should_prune(self) -> bool:
        """Whether the pruner of rank 0 prunes the trial."""
        return bool(share(self._trial is not None and self._trial.should_prune()))

    def set_user_attr(self, key: str, value: Any) -> None:
        """Attach a note to the trial."""
        if self._trial is not None:
            self._trial.set_user_attr(key, value)


def _split(kwargs: dict[str, Any], optuna: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort `kwargs` by the Optuna function that takes them."""
    for_create = set(inspect.signature(optuna.create_study).parameters) - _OURS
    for_optimize = set(inspect.signature(optuna.Study.optimize).parameters) - _OURS
    for name in kwargs:
        if name not in for_create | for_optimize:
            allowed = sorted(for_create | for_optimize)
            raise TypeError(
                f"hyperparameter_search(backend='optuna') has no argument {name!r}; Optuna takes {allowed}."
                f"{closest(name, allowed)}"
            )
    if kwargs.get("n_jobs", 1) != 1:
        raise ValueError(
            f"n_jobs={kwargs['n_jobs']} would train several trials at once on one Trainer. Start the script several "
            "times instead, with the same storage=, study_name= and load_if_exists=True: the processes share the study."
        )
    create = {name: value for name, value in kwargs.items() if name in for_create}
    # A finished trial leaves a model in reference cycles; collecting it costs milliseconds and frees its memory.
    optimize = {"gc_after_trial": True} | {name: value for name, value in kwargs.items() if name in for_optimize}
    return create, optimize


def _study(optuna: Any, directions: list[str], create: dict[str, Any]) -> Any:
    """A new study, or with `load_if_exists` the stored one, which must optimise in the same directions."""
    study = _created(optuna, directions, create)
    stored = [direction.name.lower() for direction in study.directions]
    if stored != directions:
        raise ValueError(
            f"direction={directions}, but the stored study {study.study_name!r} has {stored}: with it the worst trials "
            "would be returned as the best. Search in its direction, or choose another study_name."
        )
    return study


def _created(optuna: Any, directions: list[str], create: dict[str, Any]) -> Any:
    """The study. Of several processes that make the tables of one new database at once, all but one fail: again."""
    tries_left = TRIES_TO_CREATE if create.get("storage") is not None and create.get("load_if_exists") else 1
    while True:
        tries_left -= 1
        try:
            return optuna.create_study(directions=directions, **create)
        except Exception as error:
            is_of_database = type(error).__module__.startswith("sqlalchemy.") or type(error).__name__ in _STORAGE_ERRORS
            if tries_left == 0 or not is_of_database:
                raise
            logger.info("The database of the study is not ready (%s); trying again.", type(error).__name__)
            time.sleep(WAIT_TO_CREATE_S)


def _record(trial: Any) -> TrialRecord:
    state = {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
    duration_s = trial.duration.total_seconds() if trial.duration is not None else None
    return TrialRecord(str(trial.number), state, tuple(trial.values or ()), dict(trial.params), duration_s)


def _warn_of_unfinished(study: Any, numbers: set[int]) -> None:
    """Name the trials that no process has finished: they run in another one, or were killed with it."""
    running = [trial.number for trial in study.trials if trial.state.name == "RUNNING" and trial.number not in numbers]
    if running:
        logger.warning(
            "Not finished in the study %r: trials %s. Another process trains them now, or was killed. Optuna finds out "
            "which where the storage has a heartbeat: storage=optuna.storages.RDBStorage(url, heartbeat_interval=60).",
            study.study_name,
            some(running, 20),
        )


def _warn_of_another_space(study: Any, numbers: set[int], directions: list[str]) -> None:
    """Warn where the best trial is one of an earlier search over other hyper-parameters."""
    names = {name for trial in study.trials if trial.number in numbers for name in trial.params}
    for trial in _best_trials(study, directions):
        if trial.number not in numbers and set(trial.params) != names:
            logger.warning(
                "The best trial of the stored study %r is number %d of an earlier search, over %s; this one searched "
                "%s. Choose another study_name to leave the earlier trials out.",
                study.study_name, trial.number, sorted(trial.params), sorted(names),
            )  # fmt: skip


def _checked(value: Any, directions: list[str]) -> float | list[float]:
    """What the objective returned, as numbers, one for each direction."""
    values = [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)]
    if len(values) != len(directions):
        raise ValueError(
            f"The objective has {len(values)} values and direction={directions} has {len(directions)}: "
            "compute_objective must return one number for each direction."
        )
    return values if len(values) > 1 else values[0]


def _best_trials(study: Any, directions: list[str]) -> list[Any]:
    completed = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not completed:
        states = sorted({trial.state.name.lower() for trial in study.trials})
        raise RuntimeError(f"None of the {len(study.trials)} trials completed; they ended as {states}.")
    return list(study.best_trials) if len(directions) > 1 else [study.best_trial]
