"""Building an optimizer out of a class and its arguments, what each family adds, and the schedule of a run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from optimizer_battery import LR, Model, built, make_args, train
from trainwright.optim.any_precision import AnyPrecisionAdamW
from trainwright.optim.build import build_optimizer, build_scheduler
from trainwright.optim.layerwise import LayerWiseDummyOptimizer, LayerWiseDummyScheduler
from trainwright.optim.registry import optimizer_class_and_kwargs


def test_muon_takes_the_hidden_matrices_alone() -> None:
    model, optimizer = built("muon")
    muon, adamw = optimizer.optimizers
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert [id(p) for group in muon.param_groups for p in group["params"]] == [id(model.attn.weight)]
    rest = sum(len(group["params"]) for group in adamw.param_groups)
    assert rest == len(list(model.parameters())) - 1


def test_any_precision_equals_adamw_in_float32() -> None:
    model, optimizer = built("adamw_anyprecision")
    other, adamw = built("adamw_torch")
    assert train(model, optimizer, 8) == pytest.approx(train(other, adamw, 8), rel=1e-5)


def test_kahan_summation_keeps_updates_below_the_precision_of_a_parameter() -> None:
    moved = []
    for use_kahan_summation in (False, True):
        parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = AnyPrecisionAdamW([parameter], lr=1e-4, use_kahan_summation=use_kahan_summation)
        for _ in range(500):  # 500 updates of 1e-4; bfloat16 cannot tell 1 - 1e-4 from 1
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved.append(1.0 - parameter.item())
    assert moved[0] == 0.0
    assert moved[1] == pytest.approx(0.05, rel=0.1)


def layerwise() -> tuple[nn.Linear, LayerWiseDummyOptimizer]:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    inner = {parameter: torch.optim.AdamW([parameter], lr=0.1) for parameter in model.parameters()}
    built = build_optimizer(model, LayerWiseDummyOptimizer, {"optimizer_dict": inner, "lr": 0.1}, [])
    assert isinstance(built, LayerWiseDummyOptimizer)
    return model, built


def test_a_layerwise_optimizer_updates_and_frees_during_the_backward_pass() -> None:
    model, optimizer = layerwise()
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(1, 2)).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.equal(before["weight"], model.weight)
    after = copy.deepcopy(model.state_dict())
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(after["weight"], model.weight)


def test_a_schedule_over_a_layerwise_optimizer_reaches_every_parameter() -> None:
    model, optimizer = layerwise()
    schedule: Any = build_scheduler(make_args(lr_scheduler_type="linear", get_warmup_steps=lambda n: 0), optimizer, 10)
    for step in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
        rates = [group["lr"] for inner in optimizer.optimizers for group in inner.param_groups]
        assert rates == pytest.approx([0.1 * (9 - step) / 10] * 2)


def test_a_layerwise_optimizer_resumes_bit_identically() -> None:
    model, optimizer = layerwise()
    for _ in range(3):
        model(torch.ones(1, 2)).square().sum().backward()
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    fresh, resumed = layerwise()
    fresh.load_state_dict(weights)
    resumed.load_state_dict(state)
    for one in (model, fresh):
        for _ in range(3):
            one(torch.ones(1, 2)).square().sum().backward()
    assert torch.equal(model.weight, fresh.weight)
    with pytest.raises(ValueError, match="has 2 parameter groups, this one has 1"):
        LayerWiseDummyOptimizer(lr=0.1).load_state_dict(state)


def test_the_dummies_exist_without_any_optimizer() -> None:
    optimizer = LayerWiseDummyOptimizer(lr=0.2)
    assert optimizer.step() is None and optimizer.step(lambda: 3) == 3
    schedule = LayerWiseDummyScheduler(lr=0.2)
    schedule.optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.2] == schedule.get_lr()


def test_the_arguments_of_the_caller_are_left_as_they_are() -> None:
    model = nn.Linear(2, 2)
    kwargs = {"lr": 0.1, "params": [{"params": [model.weight]}]}
    optimizer = build_optimizer(model, torch.optim.SGD, kwargs, [{"params": [model.bias]}])
    assert optimizer.param_groups[0]["params"] == [model.weight]
    assert kwargs.keys() == {"lr", "params"}


def test_the_schedule_follows_the_arguments_of_the_run() -> None:
    _, optimizer = built("sgd")
    args = make_args(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr_rate": 0.5}')
    schedule: Any = build_scheduler(args, optimizer, 6)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([0.0, LR / 2, LR])  # two updates of warmup
    assert rates[-1] == pytest.approx(LR / 2)


def test_a_schedule_argument_of_another_name_is_an_error() -> None:
    _, optimizer = built("sgd")
    with pytest.raises(ValueError, match=r"'linear' has no argument 'min_lr' \(lr_scheduler_kwargs\)"):
        build_scheduler(make_args(lr_scheduler_kwargs={"min_lr": 0.1}), optimizer, 6)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "needs optim_target_modules"),
        ("atn", "matches no trainable linear module; the model has"),
        (3, "3 must be"),
    ],
)
def test_target_modules_that_cannot_work_are_named(targets: Any, message: str) -> None:
    pytest.importorskip("galore_torch")
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer_class_and_kwargs(make_args(optim="galore_adamw", optim_target_modules=targets), Model())


def test_galore_options_mark_the_target_group() -> None:
    pytest.importorskip("galore_torch")
    model = Model()
    args = make_args(optim="galore_adamw", weight_decay=0.0, optim_args="rank=2,update_proj_gap=5,scale=0.5")
    _, kwargs = optimizer_class_and_kwargs(args, model)
    others, targets = kwargs["params"]
    assert {key: value for key, value in targets.items() if key != "params"} == {
        "rank": 2,
        "update_proj_gap": 5,
        "scale": 0.5,
        "proj_type": "std",
    }
    assert targets["params"] == [model.attn.weight] and len(others["params"]) == len(list(model.parameters())) - 1


def test_embeddings_keep_a_32_bit_state_with_bitsandbytes() -> None:
    model, optimizer = built("adamw_bnb_8bit")
    train(model, optimizer, 1)
    dtypes = [optimizer.state[layer.weight]["state1"].dtype for layer in (model.embed, model.lm_head)]
    assert dtypes == [torch.float32, torch.uint8]


@pytest.mark.parametrize(
    "optim", ["paged_ademamix_32bit", "paged_ademamix_8bit", "paged_adamw_8bit", "paged_lion_32bit"]
)
def test_paged_optimizers_train_large_tensors_on_a_cpu(optim: str) -> None:
    model, optimizer = built(optim, nn.Linear(320, 320))  # above the 100,000 numbers from which the package pages
    before = model.weight.detach().clone()
    model(torch.ones(1, 320)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
