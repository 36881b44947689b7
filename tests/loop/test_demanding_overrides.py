"""Overrides that demand an argument for which the documented hook has a default; labels that only a hook consumes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainwright import Trainer


def demanding(name: str) -> Any:
    """An override of the hook `name` that has its arguments without their defaults; None where it has no default."""
    own = getattr(Trainer, name)
    parameters = list(inspect.signature(own).parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    if kinds != {inspect.Parameter.POSITIONAL_OR_KEYWORD} or all(p.default is p.empty for p in parameters):
        return None
    names = ", ".join(parameter.name for parameter in parameters)
    namespace: dict[str, Any] = {"own": own}
    exec(f"def {name}({names}):\n    return own({names})", namespace)
    return namespace[name]


HOOKS = [
    name for name, value in vars(Trainer).items()
    if inspect.isfunction(value) and not name.startswith("__") and demanding(name)
]  # fmt: skip
# What `values` in the Trainer's constructor decides, and hooks that scripts override most.
assert {"get_eval_dataloader", "create_optimizer", "create_scheduler", "log", "compute_loss", "evaluate"} <= set(HOOKS)


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.endswith(("runtime", "per_second"))}


@pytest.mark.parametrize("name", HOOKS)
def test_an_override_may_demand_what_the_hook_has_a_default_for(make_trainer: Any, line_data: Any, name: str) -> None:
    arguments: dict[str, Any] = {
        "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    }  # fmt: skip
    found = []
    for cls in (Trainer, type("Demanding", (Trainer,), {name: demanding(name)})):
        trainer = make_trainer(cls=cls, **arguments)
        # A call of the script itself leaves arguments out only where the hook is the Trainer's.
        assert trainer.train().global_step == 4
        metrics = trainer.evaluate(), trainer.predict(line_data(3)).metrics
        arguments["max_steps"] = 6
        again = make_trainer(cls=cls, **arguments)
        assert again.train(resume_from_checkpoint=True).global_step == 6
        arguments["max_steps"] = 4
        found.append((*map(untimed, metrics), [untimed(line) for line in again.state.log_history if "loss" in line]))
    assert found[0] == found[1]


class OfOneDataset(Trainer):
    """Names the argument as it likes, and builds a loader of what it is given."""

    def get_eval_dataloader(self, dataset: Any) -> Any:
        self.given = [*getattr(self, "given", []), dataset]
        return DataLoader(dataset, batch_size=5)


def test_a_loader_that_demands_the_evaluation_set_is_given_it(make_trainer: Any, line_data: Any) -> None:
    trainer, plain = make_trainer(cls=OfOneDataset), make_trainer()
    assert untimed(trainer.evaluate()) == pytest.approx(untimed(plain.evaluate()), rel=1e-6)
    other = line_data(4, seed=8)
    trainer.evaluate(other)
    assert len(list(trainer.get_eval_dataloader())) == 2  # of nine samples
    assert trainer.given[0] is trainer.given[2] is trainer.eval_dataset and trainer.given[1] is other


def test_an_optimizer_that_demands_the_model_and_a_schedule_its_optimizer_are_given_them(make_trainer: Any) -> None:
    seen = []

    class Builds(Trainer):
        def create_optimizer(self, model: Any) -> Any:
            seen.append(model)
            self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any) -> Any:
            seen.append(optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
            return self.lr_scheduler

    trainer = make_trainer(cls=Builds, max_steps=2)
    trainer.train()
    assert seen[0] is trainer.model and isinstance(seen[1], torch.optim.SGD)


def test_a_schedule_without_room_for_the_optimizer_is_built_without_it(make_trainer: Any) -> None:
    class Older(Trainer):
        def create_scheduler(self, num_training_steps: int) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer)
            return self.lr_scheduler

    assert make_trainer(cls=Older, max_steps=2).train().global_step == 2


# ------------------------------------------------------------------------------------- labels that a hook consumes ----


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.linear(x)
        return {"logits": logits} if labels is None else {"loss": (logits - labels).pow(2).mean(), "logits": logits}


class InLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        target = inputs.pop("target")
        outputs = model(**inputs)
        loss = (outputs["logits"] - target).pow(2).mean()
        return (loss, outputs) if return_outputs else loss


class InPreparation(Trainer):
    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs({"x": inputs["x"], "labels": inputs["target"]})


class InPrediction(Trainer):
    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        target = inputs.pop("target")
        with torch.no_grad():
            logits = model(**inputs)["logits"]
        return (logits - target).pow(2).mean(), logits, target


@pytest.mark.parametrize("cls", [InLoss, InPrediction])
def test_a_label_may_be_a_column_that_an_override_consumes(make_trainer: Any, line_data: Any, cls: type) -> None:
    data = line_data(9, seed=5)
    rows = [{"x": data.x[i], "target": data.y[i]} for i in range(len(data))]
    given = {"model": Plain(), "train_dataset": rows, "eval_dataset": rows}
    trainer = make_trainer(trainer=given, cls=cls, label_names=["target"], per_device_eval_batch_size=4)
    loss = (trainer.model.linear(data.x) - data.y).pow(2).mean().item()
    output = trainer.predict(rows)
    assert output.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert output.label_ids.tolist() == data.y.tolist()
    assert output.predictions.shape == (9, 1)
    if cls is InLoss:
        trainer.args.max_steps = 2
        assert trainer.train().global_step == 2


def test_a_label_may_be_a_column_that_preparing_the_inputs_consumes(make_trainer: Any, line_data: Any) -> None:
    data = line_data(9, seed=5)
    rows = [{"x": data.x[i], "target": data.y[i]} for i in range(len(data))]
    given = {"model": Plain(), "train_dataset": rows, "eval_dataset": rows}
    trainer = make_trainer(trainer=given, cls=InPreparation, label_names=["target"], max_steps=2)
    assert trainer.train().global_step == 2
    output = trainer.predict(rows)
    assert output.label_ids.tolist() == data.y.tolist() and output.predictions.shape == (9, 1)
    loss = (trainer.model.linear(data.x) - data.y).pow(2).mean().item()
    assert output.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_label_that_nothing_consumes_is_still_refused(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"label_names=.*'target'"):
        make_trainer(trainer={"model": Plain()}, label_names=["target"])
