"""One hyper-parameter search, as the Trainer uses it.

Owns: `SearchSession`: the engine, the space and the objective of a search that runs. Leaves to others: the engines (one
file each), training a trial (Trainer).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

from trainwright.names import HPSearchBackend
from trainwright.outputs import BestRun
from trainwright.report.search_page import write_search_page
from trainwright.report.trials import text_table, write_csv
from trainwright.search.assign import apply_trial
from trainwright.search.backends import SearchBackend, SearchContext, check_directions, choose_backend, trial_id
from trainwright.search.failures import with_trial_failures
from trainwright.search.spaces import default_compute_objective

logger = logging.getLogger(__name__)


class SearchSession:
    """The engine called `backend` (default: the first installed), and what it searches and optimises."""

    def __init__(
        self,
        backend: str | HPSearchBackend | None,
        hp_space: Callable[[Any], dict[str, Any]] | None,
        compute_objective: Callable[[dict[str, float]], float] | None,
        hp_name: Callable[[Any], str] | None,
    ) -> None:
        self.engine: SearchBackend = choose_backend(backend)
        self.backend = HPSearchBackend(self.engine.__name__.rpartition(".")[2])  # type: ignore[attr-defined]
        self.hp_space = hp_space if hp_space is not None else self.engine.default_hp_space
        self.compute_objective = compute_objective if compute_objective is not None else default_compute_objective
        self.hp_name = hp_name

    def run(
        self, train: Callable[..., Any], args: Any, n_trials: int, direction: Any, **kwargs: Any
    ) -> BestRun | list[BestRun]:
        """Train `n_trials` with `train(trial, checkpoint_dir)`; return the best of those that did not fail.

        Process 0 logs the table of trials, and writes it to `args.output_dir` as `search_trials.csv` and, with
        pictures, `search_report.html`; also where the search ends with an error.
        """
        context = SearchContext(
            num_gpus=args.n_gpu, ray_scope=args.ray_scope or "last", evaluates_while_training=args.eval_strategy != "no"
        )
        try:
            return self.engine.run(
                with_trial_failures(train), n_trials, direction, hp_space=self.hp_space, context=context, **kwargs
            )
        finally:
            if context.trials and args.should_save:
                directions = check_directions(direction, several=True)
                page = write_search_page(args.output_dir, context.trials, directions)
                write_csv(args.output_dir, context.trials, directions)
                logger.info(
                    "The trials, best first (%s has pictures):\n%s", page, text_table(context.trials, directions)
                )

    def apply(self, trial: Any, args: Any) -> None:
        """Set the trial's hyper-parameters on `args`, each converted to the type of its field."""
        apply_trial(args, self.engine.params_of(trial, self.hp_space))

    def report(
        self, trial: Any, objective: Any, step: int, metrics: dict[str, float], save: Callable[[str], None] | None
    ) -> None:
        """Report an intermediate result to the engine; it may end the trial here, with an exception.

        `save(directory)` writes a checkpoint, for an engine that stores them; None: there is none at this step.
        """
        if save is None or self.backend is not HPSearchBackend.RAY:
            self.engine.report(trial, objective, step, metrics)
            return
        with tempfile.TemporaryDirectory() as directory:
            save(directory)
            self.engine.report(trial, objective, step, metrics, checkpoint_dir=directory)

    def directory_of(self, trial: Any) -> str:
        """The name of the directory of a trial's checkpoints."""
        return self.hp_name(trial) if self.hp_name is not None else f"run-{trial_id(trial)}"
