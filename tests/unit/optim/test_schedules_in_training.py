"""Every schedule in real runs: the learning rate of every update, resuming in the middle, and those that follow a
metric."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from test_schedules import CASES, IDS, LR, TOTAL, WARMUP

from trainwright import HfArgumentParser, TrainerCallback, TrainingArguments
from trainwright.names import SchedulerType
from trainwright.optim.greedy import GreedyLR

SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


def rates_of(trainer: Any) -> list[float]:
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


@pytest.mark.parametrize(("name", "kwargs", "factor"), CASES, ids=IDS)
def test_every_update_uses_the_closed_form_and_a_resumed_run_goes_on_with_it(
    name: str, kwargs: dict[str, Any], factor: Callable[[int], float], make_trainer: Any, tmp_path: Any
) -> None:
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "warmup_steps": WARMUP, "learning_rate": LR}
    options |= {"max_steps": TOTAL, "save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(**options)
    whole.train()
    assert rates_of(whole) == pytest.approx([LR * factor(step) for step in range(TOTAL)], rel=1e-12, abs=1e-15)
    for step in (6, 12):
        resumed = make_trainer(**options, output_dir=str(tmp_path / "again"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert rates_of(resumed) == rates_of(whole)
        assert torch.equal(resumed.model.linear.weight, whole.model.linear.weight)


@pytest.mark.parametrize("given", [{"warmup_steps": 5}, {"warmup_ratio": 0.25}, {"warmup_steps": 0.25}])
def test_a_warmup_is_a_number_of_updates_or_a_share_of_the_run(given: dict[str, float], make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=20, lr_scheduler_type="constant_with_warmup", **given)
    trainer.train()
    assert rates_of(trainer) == pytest.approx([0.1 * min(1.0, step / 5) for step in range(20)])


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cosine", {"num_cycle": 2}, r"'cosine' has no argument 'num_cycle' .*Did you mean 'num_cycles'\?"),
        ("cosine_with_min_lr", {"min_rl": 1e-5}, r"no argument 'min_rl' .*Did you mean 'min_lr'\?"),
        ("warmup_stable_decay", {"num_decay_step": 3}, r"Did you mean 'num_decay_steps'\?"),
        ("warmup_stable_decay", {}, "requires `num_decay_steps`; pass it in lr_scheduler_kwargs"),
        ("polynomial", {"lr_end": 1.0}, "lr_end=1.0 must lie below the initial learning rate 0.1"),
        ("greedy", {"patince": 2}, r"no argument 'patince' .*Did you mean 'patience'\?"),
        ("reduce_lr_on_plateau", {"factr": 0.5}, r"no argument 'factr' .*Did you mean 'factor'\?"),
    ],
)
def test_a_setting_that_a_schedule_does_not_have_is_found_before_the_first_step(
    name: str, kwargs: dict[str, Any], message: str, make_trainer: Any
) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 1} if name in ("greedy", "reduce_lr_on_plateau") else {}
    trainer = make_trainer(max_steps=2, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, **evaluation)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.train_dataset.fetched == []


def test_the_command_line_takes_the_settings_as_json(tmp_path: Any) -> None:
    line = ["--output_dir", str(tmp_path), "--lr_scheduler_type", "cosine_with_min_lr"]
    line += ["--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}', "--learning_rate_per_module", '{"head": 1e-3}']
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1} and args.learning_rate_per_module == {"head": 1e-3}
    assert args.lr_scheduler_type is SchedulerType.COSINE_WITH_MIN_LR


# -- schedules that follow a metric ------------------------------------------------------------------------------------

METRICS = [5.0, 4.0, 4.5, 4.6, 3.0, 3.1, 3.2, 3.3, 3.4, 1.0, 0.9, 0.8]  # one evaluation after each update


def follow(name: str, metrics: list[float], sign: int = 1, **options: Any) -> list[float]:
    """The rates of the updates, by the rules written out: `patience` 1, `factor` 0.5."""
    rate, best, good, bad, rates = 0.1, float("inf"), 0, 0, []
    for metric in metrics:
        rates.append(rate)
        if sign * metric < best:
            best, good, bad = sign * metric, good + 1, 0
        else:
            good, bad = 0, bad + 1
        if bad > 1:
            rate, bad = max(rate * 0.5, options.get("min_lr", 0.0)), 0
        elif good > 1 and name == "greedy":
            rate, good = min(rate / 0.5, options["max_lr"]), 0
    return rates


def run(
    make_trainer: Any, name: str, metrics: list[float] = METRICS, checkpoint: str | None = None, **options: Any
) -> Any:
    """A run whose evaluations return `metrics`, one after each update."""
    bounds = {"min_lr": 0.03, "max_lr": 0.2} if name == "greedy" else {"min_lr": 0.03}
    settings = {"patience": 1, "factor": 0.5, **bounds, **options.pop("settings", {})}
    values = {"max_steps": len(metrics), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    values |= {"save_steps": 1, "lr_scheduler_type": name, "lr_scheduler_kwargs": settings, "learning_rate": 0.1}
    place: dict[str, Any] = {}

    def score(prediction: Any) -> dict[str, float]:
        return {"score": metrics[max(0, place["trainer"].state.global_step - 1)]}

    trainer = make_trainer(
        trainer={"compute_metrics": score},
        **(values | {"metric_for_best_model": "score", "greater_is_better": False} | options),
    )
    place["trainer"] = trainer
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize("name", ["greedy", "reduce_lr_on_plateau"])
def test_the_rate_follows_the_metric_of_each_evaluation(name: str, make_trainer: Any) -> None:
    trainer = run(make_trainer, name)
    expected = follow(name, METRICS, min_lr=0.03, max_lr=0.2)
    assert rates_of(trainer) == pytest.approx(expected)
    assert len(set(expected)) > 2  # it did move


@pytest.mark.parametrize("name", ["greedy", "reduce_lr_on_plateau"])
def test_a_metric_where_more_is_better_is_followed_upwards(name: str, make_trainer: Any) -> None:
    upwards = [-metric for metric in METRICS]
    trainer = run(make_trainer, name, upwards, greater_is_better=True)
    assert rates_of(trainer) == pytest.approx(follow(name, upwards, sign=-1, min_lr=0.03, max_lr=0.2))
    against = run(make_trainer, name, upwards, greater_is_better=True, settings={"mode": "min"})
    assert rates_of(against) == pytest.approx(follow(name, upwards, min_lr=0.03, max_lr=0.2))


@pytest.mark.parametrize("name", ["greedy", "reduce_lr_on_plateau"])
@pytest.mark.parametrize("step", [3, 7])
def test_a_resumed_run_knows_the_evaluations_before(name: str, step: int, make_trainer: Any, tmp_path: Any) -> None:
    whole = run(make_trainer, name)
    checkpoint = str(tmp_path / "out" / f"checkpoint-{step}")
    # The checkpoint of a step holds what the evaluation of that step did to the rate.
    rate = torch.load(os.path.join(checkpoint, "optimizer.pt"))["param_groups"][0]["lr"]
    assert rate == pytest.approx(follow(name, METRICS, min_lr=0.03, max_lr=0.2)[step])
    resumed = run(make_trainer, name, checkpoint=checkpoint, output_dir=str(tmp_path / "again"))
    assert rates_of(resumed) == rates_of(whole)
    assert torch.equal(resumed.model.linear.weight, whole.model.linear.weight)
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


@pytest.mark.parametrize("name", ["greedy", "reduce_lr_on_plateau"])
def test_an_evaluation_by_hand_leaves_the_rate_alone(name: str, make_trainer: Any) -> None:
    class Look(TrainerCallback):
        trainer: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rate = self.trainer.get_learning_rates()
            self.trainer.evaluate()
            assert self.trainer.get_learning_rates() == rate

    look = Look()
    trainer = make_trainer(
        trainer={"callbacks": [look]}, max_steps=4, lr_scheduler_type=name, eval_strategy="steps", eval_steps=2
    )
    look.trainer = trainer
    trainer.train()
    assert trainer.lr_scheduler.last_epoch == 2  # two evaluations of its own, and four by hand


@pytest.mark.parametrize("name", ["greedy", "reduce_lr_on_plateau"])
def test_a_schedule_that_never_gets_a_metric_is_refused(name: str, make_trainer: Any) -> None:
    with pytest.raises(ValueError, match=f"lr_scheduler_type='{name}' needs a metric, but eval_strategy='no'"):
        make_trainer(lr_scheduler_type=name)


def test_a_schedule_that_was_passed_in_steps_as_its_kind_does(make_trainer: Any, line_model: Any) -> None:
    def pair(kind: Callable[..., Any]) -> dict[str, Any]:
        model = line_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return {"model": model, "optimizers": (optimizer, kind(optimizer, patience=0, factor=0.5))}

    for kind in (torch.optim.lr_scheduler.ReduceLROnPlateau, GreedyLR):
        trainer = make_trainer(trainer=pair(kind), max_steps=4, eval_strategy="steps", eval_steps=2)
        trainer.train()
        assert trainer.lr_scheduler.last_epoch == 2
        with pytest.raises(ValueError, match=rf"The schedule in optimizers= \({kind.__name__}\) steps on a metric"):
            make_trainer(trainer=pair(kind))
