"""Which checkpoints are written and kept, what is in them, and the best one."""

import json

import pytest
import torch

from of_runs import checkpoints, weights_in
from trainwright import Trainer

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "max_steps": 4,
}


# ------------------------------------------------------------------------------------------------- the best model ----


class Scripted(Trainer):
    """Evaluations return the scores of a list, in turn."""

    scores = (3.0, 1.0, 2.0, 4.0)

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        metrics["eval_score"] = self.scores[self.state.global_step - 1]
        return metrics


def scored(make_trainer, **arguments):
    def compute_metrics(prediction):
        return {"score": 0.0}

    return make_trainer(trainer={"compute_metrics": compute_metrics}, cls=Scripted, **{**BEST, **arguments})


@pytest.mark.parametrize("greater, best_step, value", [(True, 4, 4.0), (False, 2, 1.0), (None, 4, 4.0)])
def test_the_best_weights_are_in_the_model_at_the_end(make_trainer, tmp_path, greater, best_step, value):
    trainer = scored(make_trainer, metric_for_best_model="score", greater_is_better=greater)
    trainer.train()
    assert trainer.state.best_metric == value and trainer.state.best_global_step == best_step
    saved = weights_in(tmp_path / "out" / f"checkpoint-{best_step}")
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_without_a_name_the_evaluation_loss_decides(make_trainer):
    trainer = make_trainer(**BEST)
    trainer.train()
    assert trainer.args.metric_for_best_model == "loss" and trainer.args.greater_is_better is False
    assert trainer.state.best_metric == min(x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x)


def test_the_strategy_best_saves_only_improvements(make_trainer):
    trainer = scored(
        make_trainer,
        save_strategy="best",
        metric_for_best_model="score",
        greater_is_better=False,
        load_best_model_at_end=False,
    )
    trainer.train()
    assert checkpoints(trainer) == [1, 2]


def test_rotation_keeps_the_best_and_the_last(make_trainer):
    trainer = scored(make_trainer, metric_for_best_model="score", greater_is_better=False, save_total_limit=1)
    trainer.train()
    assert checkpoints(trainer) == [2, 4]


def test_rotation_keeps_the_newest(make_trainer):
    trainer = make_trainer(max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert checkpoints(trainer) == [4, 5]


def test_save_only_model_leaves_out_what_only_a_resume_needs(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_only_model=True).train()
    names = {path.name for path in (tmp_path / "out" / "checkpoint-1").iterdir()}
    assert {"model.safetensors", "trainer_state.json", "training_args.bin"} <= names
    assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_a_checkpoint_holds_the_documented_files(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps").train()
    names = {path.name for path in (tmp_path / "out" / "checkpoint-1").iterdir()}
    documented = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert names >= documented | {"training_args.bin", "manifest.json"}
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 1 and state["log_history"][0]["step"] == 1


def test_the_strategy_best_and_loading_the_best_go_together(make_trainer, tmp_path):
    trainer = scored(make_trainer, save_strategy="best", metric_for_best_model="score", greater_is_better=False)
    trainer.train()
    assert checkpoints(trainer) == [1, 2]
    saved = weights_in(tmp_path / "out" / "checkpoint-2")
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_the_best_checkpoint_is_named_in_the_state_even_where_evaluations_are_more_frequent(make_trainer, tmp_path):
    trainer = scored(make_trainer, save_steps=2, metric_for_best_model="score", greater_is_better=False)
    trainer.train()  # the best score is at step 2, a multiple of both
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-2")
