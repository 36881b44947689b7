"""The interface of search engines, and choosing one.

Owns: choosing a backend, the types of its interface (`SearchContext`, `NamedTrial`), shared checks.
Leaves to others: the engines (one file each), and training a trial.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from trainwright.interop.optional import is_installed
from trainwright.names import HPSearchBackend, closest
from trainwright.outputs import BestRun
from trainwright.report.trials import TrialRecord

# Engine -> pip command, in the order in which the first installed one is chosen. SigOpt is not among them: its client
# can still be installed, but its service has ended (`sigopt.py` raises the error).
PIP_COMMANDS = {
    HPSearchBackend.OPTUNA: "pip install 'trainwright[optuna]'",
    HPSearchBackend.RAY: "pip install 'trainwright[ray]'",
    HPSearchBackend.WANDB: "pip install 'trainwright[wandb]'",
}
DIRECTIONS = ("minimize", "maximize")

# Trains one trial, from a checkpoint directory where the engine restores one, and returns what is optimised.
Objective = Callable[..., Any]


@dataclass(frozen=True)
class SearchContext:
    """What an engine and the Trainer tell each other."""

    num_gpus: int = 0  # GPUs of this machine that one trial may use
    ray_scope: str = "last"  # which of a trial's results Ray compares (`TrainingArguments.ray_scope`)
    evaluates_while_training: bool = True  # whether a scheduler gets to see results before a trial ends
    # The trials of the search, also those of other processes and of failed searches: the engine appends them.
    trials: list[TrialRecord] = field(default_factory=list)


class NamedTrial(dict[str, Any]):
    """A trial of an engine that has no trial object: its hyper-parameters and its id."""

    def __init__(self, params: dict[str, Any], run_id: str) -> None:
        super().__init__(params)
        self.run_id = run_id
        self.last_reported: float | None = None  # so that the final value is not reported twice


class SearchBackend(Protocol):
    """What the module of an engine defines."""

    def default_hp_space(self, trial: Any) -> Any: ...

    def params_of(self, trial: Any, hp_space: Callable[[Any], Any]) -> dict[str, Any]:
        """The hyper-parameters of `trial`, for `assign.apply_trial`."""

    def report(
        self,
        trial: Any,
        value: Any,
        step: int,
        metrics: dict[str, float] | None = None,
        checkpoint_dir: str | None = None,
    ) -> None:
        """Tell the engine the objective at `step`; raises where the engine decides to end the trial."""

    def run(
        self,
        objective: Objective,
        n_trials: int,
        direction: str | Sequence[str],
        hp_space: Callable[[Any], Any] | None = None,
        context: SearchContext | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Run `n_trials` of `objective(trial, checkpoint_dir=None)` and return the best."""


def choose_backend(name: str | HPSearchBackend | None = None) -> SearchBackend:
    """The engine called `name`, or the first installed one: optuna, ray, wandb.

    ValueError for an unknown name, RuntimeError with the pip command for an engine that is not installed.
    """
    if name is None:
        name = next((backend for backend in PIP_COMMANDS if is_installed(backend.value)), None)
        if name is None:
            ways = "\n  ".join(f"{backend.value}: {command}" for backend, command in PIP_COMMANDS.items())
            raise RuntimeError(f"hyperparameter_search needs one of these packages, and none is installed:\n  {ways}")
    backend = HPSearchBackend(name)
    if backend is not HPSearchBackend.SIGOPT and not is_installed(backend.value):
        raise RuntimeError(
            f"hyperparameter_search(backend={backend.value!r}) needs the package {backend.value!r}, which is not "
            f"installed. Run: {PIP_COMMANDS[backend]}"
        )
    return cast(SearchBackend, importlib.import_module(f"trainwright.search.{backend.value}"))


def trial_id(trial: Any) -> str:
    """The id of `trial`: the number of an Optuna trial, the id of a Ray trial or of a W&B run."""
    return str(trial.run_id if isinstance(trial, NamedTrial) else trial.number)


def check_directions(direction: str | Sequence[str], several: bool = False) -> list[str]:
    """`direction` as a list. ValueError for a wrong word, and for more than one where not `several` are possible."""
    directions = [direction] if isinstance(direction, str) else list(direction)
    for word in directions:
        if word not in DIRECTIONS:
            raise ValueError(f"direction={word!r} must be 'minimize' or 'maximize'.{closest(word, DIRECTIONS)}")
    if not directions or (len(directions) > 1 and not several):
        raise ValueError(f"direction={direction!r} must name one direction; only backend='optuna' optimises several.")
    return directions


def check_n_trials(n_trials: int) -> None:
    """ValueError for a number of trials that no search can run."""
    if n_trials < 1:
        raise ValueError(f"n_trials={n_trials} must be at least 1.")
