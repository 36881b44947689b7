"""Every optimizer inside real runs: saved, resumed bit for bit, evaluated in between; and the special cases."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from optimizer_battery import BETAS, DECAY, LR, NAMES, OPTIONS, WIDTH, Model, built, class_or_skip, make_args
from trainwright import CombinedOptimizer, Trainer, TrainerCallback, TrainingArguments
from trainwright.names import ParallelMode
from trainwright.optim.fused_backward import updates_in_backward
from trainwright.optim.lomo import gradient_norm
from trainwright.optim.registry import optimizer_class_and_kwargs

ROWS = [{"input_ids": torch.tensor(n), "labels": torch.tensor((n + 1) % WIDTH)} for n in range(WIDTH)]
pytestmark = pytest.mark.usefixtures("uncompiled")


def make(path: Path, optim: str = "adamw_torch", trainer: Any = None, model: Any = None, **changes: Any) -> Trainer:
    values: dict[str, Any] = {
        "optim": optim,
        "optim_args": OPTIONS.get(optim),
        "optim_target_modules": ["attn"],
        "learning_rate": LR,
        "weight_decay": DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "per_device_train_batch_size": 16,
        "max_steps": 8,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(path), **(values | changes))
    model = Model() if model is None else model
    class_or_skip(args, model)
    return Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:8], **(trainer or {}))


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    keys = ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
    lines = [{key: line[key] for key in keys if key in line} for line in trainer.state.log_history]
    return [line for line in lines if len(line) > 1]


def assert_same(one: Trainer, other: Trainer) -> None:
    assert log_of(one) == log_of(other)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


# Saves at 3 and 6, evaluates at 2, 4, 6 and 8: neither falls on the other, so both switches of schedule-free happen.
SAVING = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize("optim", NAMES)
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make(tmp_path / "run", optim, **SAVING)
    whole.train()
    assert log_of(whole)[0]["loss"] > log_of(whole)[-1]["eval_loss"]
    for step in (3, 6):
        resumed = make(tmp_path / "again", optim, **SAVING)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert_same(resumed, whole)
    assert "holds objects" not in caplog.text and "foreign" not in caplog.text


@pytest.mark.parametrize("optim", NAMES)
def test_weights_are_averaged_over_the_steps_of_every_optimizer_and_resume_bit_for_bit(
    optim: str, tmp_path: Path
) -> None:
    averaging = {"ema_decay": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": LR}
    steps: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            steps.append({name: value.detach().clone() for name, value in model.named_parameters()})

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.on_train_begin(*args, **kwargs)

    whole = make(tmp_path / "run", optim, trainer={"callbacks": [Watch()]}, **averaging)
    if optim.startswith("schedule_free"):
        with pytest.raises(ValueError, match="averages them itself: leave out ema_decay"):
            whole.train()
        return
    whole.train()
    expected = steps[0]
    for weights in steps[1:]:
        expected = {name: torch.lerp(value, weights[name], 0.5) for name, value in expected.items()}
    found = load_file(tmp_path / "run" / "checkpoint-4" / "ema.safetensors")
    assert len(steps) == 5 and all(torch.equal(found[name], value) for name, value in expected.items())
    resumed = make(tmp_path / "again", optim, **averaging)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(resumed, whole)
    again = load_file(tmp_path / "again" / "checkpoint-4" / "ema.safetensors")
    assert all(torch.equal(again[name], value) for name, value in found.items())


@pytest.mark.parametrize("optim", NAMES)
def test_gradients_are_clipped_or_it_is_said_that_they_are_not(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, optim, max_steps=2, max_grad_norm=0.5)
    trainer.train()
    norms = [line.get("grad_norm") for line in log_of(trainer) if "loss" in line]
    if "layerwise" in optim:
        assert norms == [None, None]
        assert f"max_grad_norm=0.5 is not applied: optim='{optim}'" in caplog.text
    else:
        assert all(norm > 0.5 for norm in norms)
        assert "is not applied" not in caplog.text


# -- during the backward pass ------------------------------------------------------------------------------------------

IN_BACKWARD = ["lomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"]


@pytest.mark.parametrize("optim", IN_BACKWARD)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 cannot work; set it to 1 or use optim="),
        ({"fp16": True}, "fp16=True cannot work; use bf16=True or optim="),
        ({"parallel_mode": ParallelMode.DISTRIBUTED}, "cannot train on several; use one process or optim="),
    ],
)
def test_what_needs_all_gradients_is_refused(optim: str, changes: dict[str, Any], message: str) -> None:
    built(optim)
    with pytest.raises(ValueError, match=f"optim='{optim}' updates .*{message}"):
        optimizer_class_and_kwargs(make_args(optim, **changes), Model())


def test_lomo_clips_as_a_plain_loop_does(tmp_path: Path) -> None:
    limit, decay = 0.5, 0.0
    trainer = make(tmp_path, "lomo", max_grad_norm=limit, weight_decay=decay, max_steps=3, warmup_steps=0)
    order = [batch["input_ids"] for batch in trainer.get_train_dataloader()][:3]
    trainer.train()
    assert updates_in_backward(trainer.optimizer)
    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    norms = []
    for step, tokens in enumerate(order):
        model(tokens, (tokens + 1) % WIDTH)["loss"].backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        sgd.param_groups[0]["lr"] = LR * (3 - step) / 3
        sgd.step()
        sgd.zero_grad()
    assert [line["grad_norm"] for line in log_of(trainer)] == pytest.approx(norms, rel=1e-4)
    assert gradient_norm(trainer.optimizer).item() == pytest.approx(norms[-1], rel=1e-4)
    for mine, expected in zip(trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_lomo_says_what_clipping_costs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "lomo", max_steps=1, max_grad_norm=1.0).train()
    assert "max_grad_norm=1.0 costs optim='lomo' a second backward pass per update" in caplog.text
    caplog.clear()
    make(tmp_path, "lomo", max_steps=1, max_grad_norm=0).train()
    assert "second backward pass" not in caplog.text


def test_lomo_refuses_weights_in_float16(tmp_path: Path) -> None:
    make(tmp_path, "lomo")
    with pytest.raises(ValueError, match="optim='lomo' cannot train weights in float16"):
        make(tmp_path, "lomo", model=Model().half())


@pytest.mark.parametrize("optim", IN_BACKWARD)
def test_a_second_trainer_on_the_same_model_updates_each_weight_once(optim: str, tmp_path: Path) -> None:
    model = Model()
    make(tmp_path, optim, model=model, max_steps=1).train()
    fresh = Model()
    fresh.load_state_dict(model.state_dict())
    again, other = (make(tmp_path, optim, model=one, max_steps=2) for one in (model, fresh))
    again.train(), other.train()
    assert_same(again, other)


def test_adalomo_resumes_with_its_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lomo_optim")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # all that the package needs a device for
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    whole = make(tmp_path / "run", "adalomo", **SAVING)
    whole.train()
    resumed = make(tmp_path / "again", "adalomo", **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same(resumed, whole)
    assert resumed.optimizer.step_num == 8


@pytest.mark.parametrize("schedule", ["greedy", "reduce_lr_on_plateau", "cosine"])
def test_every_kind_of_schedule_moves_a_rate_that_is_a_tensor(schedule: str, tmp_path: Path) -> None:
    settings = {  # the loss falls, which one of them is told to take for the better and one for the worse
        "greedy": {"patience": 0, "factor": 0.5, "min_lr": 0.0, "max_lr": 1.0},
        "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5, "mode": "max"},
    }.get(schedule, {})
    options = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": settings, "warmup_steps": 0, **SAVING}
    trainer = make(tmp_path, "adamw_torch_8bit", **options)
    trainer.create_optimizer()
    tensor = trainer.optimizer.param_groups[0]["lr"]  # torchao compiles the update around it
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] is tensor
    assert tensor.item() != pytest.approx(LR, rel=1e-3)


# -- schedule-free -----------------------------------------------------------------------------------------------------

SCHEDULE_FREE = ["schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"]


class SaveAside(TrainerCallback):
    """Saves the model in the middle of training, as a user's callback may."""

    trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            before = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
            self.trainer.save_model(os.path.join(args.output_dir, "aside"))
            self.moved = [
                name
                for name, value in self.trainer.model.state_dict().items()
                if (value - before[name]).abs().max() > 1e-5
            ]


@pytest.mark.parametrize("optim", SCHEDULE_FREE)
def test_saved_weights_are_the_averaged_ones(optim: str, tmp_path: Path) -> None:
    callback = SaveAside()
    trainer = make(tmp_path, optim, trainer={"callbacks": [callback]}, lr_scheduler_type="constant", **SAVING)
    callback.trainer = trainer
    trainer.train()
    assert callback.moved == []  # training goes on from the weights it had
    aside, checkpoint = (load_file(tmp_path / name / "model.safetensors") for name in ("aside", "checkpoint-6"))
    for name, value in aside.items():
        torch.testing.assert_close(value, checkpoint[name], rtol=1e-4, atol=1e-5)
    trainer.save_model(str(tmp_path / "final"))
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in final.items())
    loss = trainer.evaluate()["eval_loss"]
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in final.items())
    model = Model()
    model.load_state_dict(final)
    batch = {key: torch.stack([row[key] for row in ROWS[:8]]) for key in ("input_ids", "labels")}
    assert model(**batch)["loss"].item() == pytest.approx(loss, rel=1e-5)
    # The weights that were trained are others: z and the average differ after eight updates.
    trainer.optimizer.train()
    assert any(not torch.equal(value, trainer.model.state_dict()[name]) for name, value in final.items())


@pytest.mark.parametrize("optim", SCHEDULE_FREE)
def test_the_best_weights_stay_what_they_are_through_evaluations(optim: str, tmp_path: Path) -> None:
    options = {**SAVING, "save_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = make(tmp_path, optim, metric_for_best_model="loss", **options)
    trainer.train()
    assert trainer.state.best_global_step == 2
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    trainer.evaluate()
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in best.items())


def test_a_warmup_that_schedule_free_cannot_know_is_refused(tmp_path: Path) -> None:
    changes = {"max_steps": -1, "warmup_steps": 0, "warmup_ratio": 0.1, "lr_scheduler_type": "constant"}
    make(tmp_path, "schedule_free_adamw")
    with pytest.raises(ValueError, match=r"A warmup of 0.1 of the run cannot be given to optim='schedule_free_adamw'"):
        make(tmp_path, "schedule_free_adamw", **changes)


def test_schedule_free_says_that_it_needs_no_decay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "schedule_free_adamw", lr_scheduler_type="constant_with_warmup")
    assert "needs no decay" not in caplog.text
    make(tmp_path, "schedule_free_adamw")
    assert (
        "optim='schedule_free_adamw' needs no decay of the learning rate, and lr_scheduler_type='linear'" in caplog.text
    )


# -- several optimizers in one object ----------------------------------------------------------------------------------


def parts(model: Any) -> list[torch.optim.Optimizer]:
    head = [*model.lm_head.parameters()]
    rest = [p for p in model.parameters() if all(p is not other for other in head)]
    return [torch.optim.SGD(head, lr=0.5, momentum=0.9), torch.optim.AdamW(rest, lr=0.01)]


def test_one_schedule_drives_every_optimizer_inside(tmp_path: Path) -> None:
    model = Model()
    combined = CombinedOptimizer(parts(model))
    trainer = make(tmp_path, model=model, trainer={"optimizers": (combined, None)}, max_steps=4, warmup_steps=0)
    rates = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append([group["lr"] for one in combined.optimizers for group in one.param_groups])

    trainer.add_callback(Watch())
    trainer.train()
    assert rates == [pytest.approx([0.5 * (4 - step) / 4, 0.01 * (4 - step) / 4]) for step in range(4)]


def test_a_combination_trains_as_its_parts_do_and_resumes(tmp_path: Path) -> None:
    def run(path: Path, checkpoint: str | None = None) -> Trainer:
        model = Model()
        optimizers = (CombinedOptimizer(parts(model)), None)
        options = {"max_grad_norm": 0, "per_device_train_batch_size": WIDTH, **SAVING}  # all rows in each update
        trainer = make(path, model=model, trainer={"optimizers": optimizers}, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run(tmp_path / "run")
    assert_same(run(tmp_path / "again", str(tmp_path / "run" / "checkpoint-3")), whole)
    tokens, model = torch.arange(WIDTH), Model()
    alone = parts(model)
    for step in range(8):
        model(tokens, (tokens + 1) % WIDTH)["loss"].backward()
        for one, rate in zip(alone, (0.5, 0.01)):
            one.param_groups[0]["lr"] = rate * min(step / 2, (8 - step) / 6)  # two updates of warmup
            one.step()
            one.zero_grad()
    for mine, expected in zip(whole.model.parameters(), model.parameters()):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_muon_is_one_object_with_one_schedule_and_resumes_with_both_states(tmp_path: Path) -> None:
    trainer = make(tmp_path, "muon", **SAVING)
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    kinds = [sorted(state) for state in saved["state"].values()]
    assert kinds.count(["momentum_buffer"]) == 1
    assert kinds.count(["exp_avg", "exp_avg_sq", "step"]) == len(list(trainer.model.parameters())) - 1
    assert {group["initial_lr"] for group in saved["param_groups"]} == {LR}


def test_an_object_of_another_kind_is_told_about_the_combination(tmp_path: Path) -> None:
    class Two:
        def __init__(self, optimizers: list[Any]) -> None:
            self.param_groups = [group for one in optimizers for group in one.param_groups]

    model = Model()
    trainer = make(tmp_path, model=model, trainer={"optimizers": (Two(parts(model)), None)})
    with pytest.raises(TypeError, match=r"Two is none. Join several with trainwright.CombinedOptimizer"):
        trainer.train()


# -- parameter groups --------------------------------------------------------------------------------------------------


def test_the_plan_lists_the_groups_with_their_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trainwright"):
        make(tmp_path, learning_rate_per_module={"lm_head": 1e-3}, log_level="info", max_steps=1).train()
    text = " ".join(caplog.text.split())
    num_decaying, num_others = WIDTH * WIDTH * 2, WIDTH * 3
    assert f"lr 0.01, weight decay 0.1 {num_decaying:,} parameters in 2 tensors: embed.weight, attn.weight" in text
    assert f"lr 0.01, weight decay 0 {num_others:,} parameters in 3 tensors: attn.bias, norm.weight, norm.bias" in text
    assert f"lr 0.001, weight decay 0.1 {WIDTH * WIDTH:,} parameters in 1 tensor: lm_head.weight" in text
    assert f"lr 0.001, weight decay 0 {WIDTH:,} parameters in 1 tensor: lm_head.bias" in text


def test_rates_per_module_follow_the_schedule_and_resume(tmp_path: Path) -> None:
    rates = {"lm_head": 1e-3, "attn": 0.5}
    whole = make(tmp_path / "run", learning_rate_per_module=rates, **SAVING)
    whole.train()
    resumed = make(tmp_path / "again", learning_rate_per_module=rates, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same(resumed, whole)
    assert {group["initial_lr"] for group in whole.optimizer.param_groups} == {LR, 1e-3, 0.5}


def test_an_optimizer_with_one_rate_refuses_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"learning_rate_per_module gives 'attn' the learning rate 0.5.*\(Lomo\)"):
        make(tmp_path, "lomo", learning_rate_per_module={"attn": 0.5}).train()


def test_an_optimizer_that_was_passed_in_must_have_the_rates_itself(tmp_path: Path) -> None:
    model = Model()
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    trainer = make(tmp_path, model=model, trainer={"optimizers": optimizers}, learning_rate_per_module={"attn": 0.5})
    with pytest.raises(
        ValueError, match=r"gives 'attn' the learning rate 0.5, but the optimizer \(SGD\) trains it at 0.1"
    ):
        trainer.train()


def test_a_class_that_was_passed_in_gets_the_rates(tmp_path: Path) -> None:
    chosen = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    trainer = make(tmp_path, trainer=chosen, learning_rate_per_module={"attn": 0.5}, max_steps=1)
    trainer.train()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [0.1, 0.1, 0.5, 0.5]
