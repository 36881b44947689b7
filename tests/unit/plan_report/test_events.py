"""How often a run logs, evaluates and saves, compared with what `train()` of the same arguments did."""

import pytest

from trainwright import TrainerCallback


class Counted(TrainerCallback):
    def __init__(self):
        self.log = self.evaluate = self.save = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.log += "loss" in logs

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluate += 1

    def on_save(self, args, state, control, **kwargs):
        self.save += 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"logging_steps": 4, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 5},
        {"logging_steps": 0.3, "eval_strategy": "steps", "eval_steps": 0.25, "save_strategy": "no"},
        {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch", "logging_first_step": True},
        {"logging_strategy": "no", "logging_first_step": True, "eval_strategy": "no", "eval_on_start": False},
        {"logging_steps": 5, "logging_first_step": True, "eval_strategy": "epoch", "eval_on_start": True},
        {"eval_strategy": "steps", "eval_steps": 4, "eval_delay": 5},
        {"eval_strategy": "steps", "eval_steps": 4, "eval_delay": 99},
        {"eval_strategy": "epoch", "eval_delay": 1.5},
        {"max_steps": 7, "logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"num_train_epochs": 1.5, "logging_steps": 500, "save_strategy": "steps", "save_steps": 500},
        {"gradient_accumulation_steps": 6, "logging_strategy": "epoch", "logging_first_step": True},
    ],
)  # fmt: skip
def test_the_counts_are_those_of_the_run(make_trainer, arguments):
    counted = Counted()
    trainer = make_trainer(trainer={"callbacks": [counted]}, **{"num_train_epochs": 2, **arguments})
    plan = trainer.plan_report().as_dict()
    assert counted.log == counted.evaluate == counted.save == 0
    trainer.train()
    planned = {name: event["count"] for name, event in plan["events"].items()}
    assert planned == {"log": counted.log, "evaluate": counted.evaluate, "save": counted.save}
    assert plan["run"]["updates"] == trainer.state.global_step


def test_what_metrics_decide_has_no_count(make_trainer):
    arguments = {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "loss"}
    report = make_trainer(num_train_epochs=2, **arguments).plan_report()
    assert report.as_dict()["events"]["save"]["count"] is None
    assert report.as_dict()["disk"]["checkpoints_at_once"] == 2  # one for each evaluation, at most
    assert "after each evaluation with a new best metric" in report.text
