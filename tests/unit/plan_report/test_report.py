"""`Trainer.plan_report()`: it says what `train()` does, and changes nothing."""

import json
import os
from pathlib import Path

import pytest
import torch

from of_runs import losses
from trainwright import Trainer, TrainerCallback

SECTIONS = {
    "version", "run", "model", "optimizer", "schedule", "events", "evaluation", "memory", "disk", "data", "time",
    "problems", "warnings",
}  # fmt: skip


def section(report, name):
    """The lines of one row of the text, joined."""
    lines, found = report.text.splitlines(), []
    for line in lines:
        if line.startswith(f"  {name}  ") or (found and line.startswith(" " * 10) and line.strip()):
            found.append(line.strip())
        elif found:
            break
    return " ".join(found)


class Noise:
    """A collator that draws from a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(4)

    def __call__(self, samples):
        rows = torch.stack([sample["x"] for sample in samples])
        rows = rows + torch.randn(rows.shape, generator=self.generator)
        return {"x": rows, "labels": torch.stack([sample["labels"] for sample in samples])}


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_run_after_a_plan_is_the_run_without_one(make_trainer, tmp_path, line_model, num_steps):
    def make():
        parts = {"model": line_model(dropout=0.3), "data_collator": Noise()}
        return make_trainer(trainer=parts, num_train_epochs=2, max_grad_norm=0.5)

    expected = make()
    expected.train()
    trainer = make()
    attributes, weights = (
        dict(vars(trainer)),
        {name: value.clone() for name, value in trainer.model.state_dict().items()},
    )
    generator, mode = torch.get_rng_state(), trainer.model.training
    report = trainer.plan_report(num_steps=num_steps)
    assert report.problems == []
    assert (report.as_dict()["time"] or {}).get("timed_updates", 0) == num_steps
    assert vars(trainer).keys() == attributes.keys()
    assert all(value is attributes[name] for name, value in vars(trainer).items())
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator) and trainer.model.training == mode
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    # Of the run that was expected.
    assert sorted(os.listdir(tmp_path / "out")) == ["metrics.jsonl", "training_report.html"]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert trainer.state.global_step == 0 and trainer.state.log_history == []
    trainer.train()
    assert losses(trainer) == losses(expected)
    assert (tmp_path / "out" / "metrics.jsonl").read_text().startswith(lines)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])


def test_callbacks_and_trackers_hear_nothing(make_trainer):
    class Fails(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_") and name != "on_init_end":
                return lambda *args, **kwargs: heard.append(name)
            return super().__getattribute__(name)

    heard = []
    trainer = make_trainer(trainer={"callbacks": [Fails()]}, num_train_epochs=1, save_strategy="steps", save_steps=1)
    report = trainer.plan_report(num_steps=2)
    assert report.as_dict()["time"]["timed_updates"] == 2 and heard == []


def test_the_numbers_of_the_run(make_trainer):
    trainer = make_trainer(num_train_epochs=3, gradient_accumulation_steps=2)  # 22 samples, 4 in a micro-batch
    report = trainer.plan_report()
    run, per_epoch = report.as_dict()["run"], -(-6 // 2)
    trainer.train()
    assert run["updates"] == trainer.state.global_step == 3 * per_epoch
    assert (run["examples"], run["micro_batches_per_epoch"], run["updates_per_epoch"]) == (22, 6, per_epoch)
    assert run["samples_per_update"] == 8 and run["samples"] == 66
    assert section(report, "updates").split(maxsplit=1) == ["updates", f"{3 * per_epoch} = 3 epochs of {per_epoch}"]
    assert section(report, "batch of an update").endswith("8 examples = 4 per device x 2 accumulated x 1 process")


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_the_learning_rates_are_those_that_the_run_logs(make_trainer, kind):
    trainer = make_trainer(num_train_epochs=2, warmup_steps=3, lr_scheduler_type=kind, logging_steps=1)
    planned = trainer.plan_report().as_dict()["schedule"]
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert planned["first_learning_rate"] == pytest.approx(rates[0])
    assert planned["highest_learning_rate"] == pytest.approx(max(rates))
    assert planned["last_learning_rate"] == pytest.approx(rates[-1])
    assert planned["name"] == kind and planned["warmup_steps"] == 3


def test_what_would_end_the_training_is_listed_and_not_raised(make_trainer, line_data):
    class Broken(line_data):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "x": torch.randn(index + 1)}

    trainer = make_trainer(trainer={"train_dataset": Broken(), "eval_dataset": Broken()}, eval_strategy="epoch")
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(False)
    report = trainer.plan_report(num_steps=2)
    assert [
        len([text for text in report.problems if words in text]) for words in ("nothing to train", "eval_dataset")
    ] == [1, 1]
    assert report.as_dict()["time"] is None
    assert "What would stop train():" in report.text and "  1. " in report.text
    with pytest.raises(Exception) as raised:
        trainer.train()
    assert str(raised.value) in report.problems


def test_a_metric_that_no_evaluation_has_is_listed(make_trainer):
    arguments = {"metric_for_best_model": "accuracy", "load_best_model_at_end": True}
    trainer = make_trainer(eval_strategy="epoch", save_strategy="epoch", **arguments)
    problems = trainer.plan_report().problems
    assert len(problems) == 1 and "accuracy" in problems[0]


def test_what_looks_like_a_mistake_in_the_numbers_is_a_warning(make_trainer):
    arguments = {"logging_steps": 500, "save_strategy": "steps", "save_steps": 500, "warmup_steps": 100}
    warnings = make_trainer(num_train_epochs=1, **arguments).plan_report().warnings
    assert len(warnings) == 3
    for words in ("logging_steps=500", "save_steps=500", "100 warmup steps"):
        assert any(words in text for text in warnings)
    assert make_trainer(num_train_epochs=1, logging_steps=2).plan_report().warnings == []


def test_warnings_of_the_looks_are_in_the_report_and_not_in_the_log(make_trainer, caplog):
    trainer = make_trainer(eval_strategy="epoch", per_device_eval_batch_size=50, dataloader_drop_last=True)
    caplog.clear()
    warnings = trainer.plan_report().warnings
    assert any("drop_last" in text for text in warnings) and caplog.records == []


def test_the_text_fits_and_the_dict_is_json(make_trainer):
    trainer = make_trainer(num_train_epochs=2, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    report = trainer.plan_report()
    assert max(map(len, report.text.splitlines())) <= 100 and str(report) == report.text
    assert report.as_dict().keys() == SECTIONS and report.as_dict()["version"] == 1
    assert json.loads(report.as_json()) == report.as_dict() and "12 updates" in repr(report)
    assert section(report, "evaluated").endswith("9 examples in 2 batches of 8")
    few = make_trainer(eval_strategy="epoch", per_device_eval_batch_size=16).plan_report()
    assert section(few, "evaluated").endswith("9 examples in 1 batch of 16")


def keys_of(value):
    if isinstance(value, list):
        return {key for one in value for key in keys_of(one)}
    if not isinstance(value, dict):
        return set()
    return set(value).union(*map(keys_of, value.values()))


def test_each_key_of_the_dict_is_documented(make_trainer):
    arguments = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 1}
    keys = keys_of(make_trainer(**arguments).plan_report(num_steps=1).as_dict())
    page = (Path(__file__).parents[3] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert len(keys) > 60 and sorted(key for key in keys if f"`{key}`" not in page) == []


def test_several_evaluation_sets_are_named(make_trainer, line_data):
    sets = {"easy": line_data(9), "hard": line_data(17)}
    report = make_trainer(trainer={"eval_dataset": sets}, eval_strategy="epoch", num_train_epochs=1).plan_report()
    assert [(one["name"], one["examples"]) for one in report.as_dict()["evaluation"]] == [("easy", 9), ("hard", 17)]
    assert "easy: 9 examples in 2 batches of 8; hard: 17 examples in 3 batches of 8" in section(report, "evaluated")


def test_hooks_that_a_subclass_overrides_are_asked(make_trainer):
    class Own(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.25, momentum=0.5)
            return self.optimizer

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs)["loss"] * 2

    trainer = make_trainer(cls=Own, num_train_epochs=1)
    plan = trainer.plan_report(num_steps=1).as_dict()
    assert plan["optimizer"]["class"] == "SGD" and plan["schedule"]["highest_learning_rate"] == 0.25
    assert plan["memory"]["optimizer_bytes"] == sum(4 * p.numel() for p in trainer.model.parameters())
    assert plan["memory"]["activations_bytes"] > 0 and trainer.optimizer is None


def test_a_model_from_model_init_can_be_planned(make_trainer, line_model):
    trainer = make_trainer(trainer={"model_init": line_model}, num_train_epochs=1)
    model = trainer.model
    assert trainer.plan_report(num_steps=1).problems == [] and trainer.model is model
