"""A search in which two processes train each trial together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from line import LineData, LineModel
from trainwright import Trainer, TrainerCallback, TrainingArguments

pytest.importorskip("optuna")

RATES = [0.001, 0.1, 0.01]


def scenarios(folder: Path) -> Any:
    """The rates that this process trained with, the best run it was told, and the weights of each trial."""
    import optuna

    trained: list[float] = []
    weights: list[list[float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained.append(args.learning_rate)

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weights.append(model.linear.weight.detach().flatten().tolist())

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            steps.append(state.global_step)

    class PruneTheLast(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return bool(trial.number == 2)

    steps: list[int] = []
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=4, optim="sgd", eval_strategy="steps", eval_steps=2, save_strategy="no",
        per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model_init=LineModel, args=arguments, train_dataset=LineData(), eval_dataset=LineData(), callbacks=[Watch()]
    )
    best = trainer.hyperparameter_search(
        # What a process samples by itself, or another order, would be seen in `trained`.
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", RATES[trial.number], RATES[trial.number])},
        n_trials=3,
        backend="optuna",
        pruner=PruneTheLast(),
    )
    return {"trained": trained, "best": best[:3], "weights": weights, "steps": steps}


def test_all_processes_train_the_same_trials_to_the_same_weights_and_return_the_same_best(two: list[Any]) -> None:
    assert two[0] == two[1]
    assert two[0]["trained"] == RATES and two[0]["best"][0] == "1"


def test_a_trial_that_is_pruned_ends_in_all_processes_at_the_same_step(two: list[Any]) -> None:
    assert [found["steps"] for found in two] == [[2, 4, 2, 4, 2]] * 2


def test_the_table_of_trials_is_written_once(two: list[Any], folder: Path) -> None:
    rows = (folder / "out" / "search_trials.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["complete", "complete", "pruned"]
