"""A search whose trials two processes train with DeepSpeed: an engine per trial, and none of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regression import Model, make, trained, weights_of, zero
from trainwright import TrainerCallback

pytest.importorskip("optuna")

STAGES = (1, 3)
TRIALS = [(0.3, 1), (1e-2, 2), (1e-3, 1)]  # learning rate, micro-batches of an update


class Watch(TrainerCallback):
    """What each trial trained with and to. All processes gather the weights together."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: list[dict[str, Any]] = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(
            {
                "trial": (args.learning_rate, args.gradient_accumulation_steps),
                "engine": self.trainer.deepspeed.gradient_accumulation_steps(),
                "weights": weights_of(self.trainer),
            }
        )


def space(trial: Any) -> dict[str, Any]:
    rate, accumulation = TRIALS[trial.number]
    return {
        "learning_rate": trial.suggest_float("learning_rate", rate, rate),
        "gradient_accumulation_steps": trial.suggest_int("gradient_accumulation_steps", accumulation, accumulation),
    }


def scenarios(folder: Path) -> dict[int, Any]:
    found = {}
    for stage in STAGES:
        watch = Watch()
        watch.trainer = make(
            folder / f"search{stage}", zero(stage), gradient_accumulation_steps=1, eval_strategy="steps", eval_steps=4,
            trainer={"model_init": Model, "callbacks": [watch]},
        )  # fmt: skip
        best = watch.trainer.hyperparameter_search(space, n_trials=len(TRIALS), backend="optuna")
        rate, accumulation = TRIALS[1]
        alone = trained(
            folder / f"alone{stage}", zero(stage), learning_rate=rate, gradient_accumulation_steps=accumulation,
            eval_strategy="steps", eval_steps=4,
        )  # fmt: skip
        found[stage] = {"trials": watch.seen, "best": best[:2], "alone": alone}
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_each_trial_trains_with_an_engine_of_its_hyper_parameters(stage: int, two: Any) -> None:
    for rank in two:
        assert [trial["trial"] for trial in rank[stage]["trials"]] == TRIALS
        assert [trial["engine"] for trial in rank[stage]["trials"]] == [accumulation for _, accumulation in TRIALS]
        assert rank[stage]["best"] == two[0][stage]["best"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_trial_ends_as_a_run_of_its_hyper_parameters_alone(stage: int, two: Any) -> None:
    alone, trial = two[0][stage]["alone"], two[0][stage]["trials"][1]
    assert alone["weights"].keys() == trial["weights"].keys()
    for name, weight in alone["weights"].items():
        assert torch.equal(trial["weights"][name], weight)
    losses = [two[0][stage]["best"][1], alone["evaluations"][-1]]
    assert losses[0] <= losses[1]
