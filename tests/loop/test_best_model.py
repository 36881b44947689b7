"""Which checkpoints are written and kept, what is in them, and the best one."""

import json

import pytest
import torch

from of_runs import checkpoints, weights_in
from trainwright import Trainer, TrainerCallback

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


def scored(make_trainer, cls=Scripted, callbacks=(), **arguments):
    def compute_metrics(prediction):
        return {"score": 0.0}

    given = {"compute_metrics": compute_metrics, "callbacks": list(callbacks)}
    return make_trainer(trainer=given, cls=cls, **{**BEST, **arguments})


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


class BestAtOne(Scripted):
    scores = (1.0, 3.0, 2.0, 4.0)


class BestAtThree(Scripted):
    scores = (3.0, 2.0, 1.0, 4.0)


@pytest.mark.parametrize("cls, at_two, at_four", [(BestAtOne, None, None), (BestAtThree, 2, 2)])
def test_a_best_step_that_was_never_saved_is_not_the_best_checkpoint(make_trainer, tmp_path, cls, at_two, at_four):
    out = tmp_path / "out"
    trainer = scored(
        make_trainer, cls=cls, save_steps=2, metric_for_best_model="score", greater_is_better=False,
        save_total_limit=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (1.0, 1 if cls is BestAtOne else 3)
    assert trainer.state.best_model_checkpoint == (at_four and str(out / f"checkpoint-{at_four}"))
    assert checkpoints(trainer) == ([4] if at_two is None else [2, 4])
    saved = weights_in(out / f"checkpoint-{at_four or 4}")  # without a best one, the last weights stay
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_what_an_earlier_run_saved_at_the_best_step_is_not_the_best_checkpoint(make_trainer, tmp_path):
    out = tmp_path / "out"
    make_trainer(max_steps=4, save_strategy="steps", save_steps=1, learning_rate=0.01).train()
    trainer = scored(
        make_trainer, cls=BestAtThree, save_steps=2, metric_for_best_model="score", greater_is_better=False
    )
    trainer.train()
    assert trainer.state.best_global_step == 3 and (out / "checkpoint-3").is_dir()
    assert trainer.state.best_model_checkpoint == str(out / "checkpoint-2")


class BestAtSix(Trainer):
    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_score": float(abs(self.state.global_step - 6))}


def test_a_step_that_was_saved_before_its_evaluation_becomes_the_best_checkpoint_at_the_next_save(
    make_trainer, tmp_path
):
    trainer = scored(
        make_trainer, cls=BestAtSix, eval_strategy="epoch", save_steps=3, metric_for_best_model="score",
        greater_is_better=False, load_best_model_at_end=False, max_steps=12,
    )  # fmt: skip
    trainer.train()  # 6 updates an epoch
    assert checkpoints(trainer) == [3, 6, 9, 12] and trainer.state.best_global_step == 6
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-6")


class WantsToSave(TrainerCallback):
    def on_evaluate(self, args, state, control, **kwargs):
        control.should_save = True


@pytest.mark.parametrize("callbacks", [[], [WantsToSave]], ids=["", "a callback asks for it"])
def test_with_the_strategy_best_no_checkpoint_is_written_for_a_worse_model(make_trainer, callbacks):
    trainer = scored(
        make_trainer, save_strategy="best", metric_for_best_model="score", greater_is_better=True, eval_steps=1,
        save_steps=1, load_best_model_at_end=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()  # 3, 1, 2, 4: the last step, too, is only saved as it is the best
    assert checkpoints(trainer) == [1, 4]
    rarely = scored(
        make_trainer, save_strategy="best", metric_for_best_model="score", greater_is_better=False, eval_steps=2,
        save_steps=1, load_best_model_at_end=False, callbacks=callbacks, output_dir=trainer.args.output_dir + "-2",
    )  # fmt: skip
    rarely.train()
    assert checkpoints(rarely) == [2]


def test_the_best_checkpoint_is_named_in_the_state_even_where_evaluations_are_more_frequent(make_trainer, tmp_path):
    trainer = scored(make_trainer, save_steps=2, metric_for_best_model="score", greater_is_better=False)
    trainer.train()  # the best score is at step 2, a multiple of both
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-2")
