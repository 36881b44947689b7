"""Building an optimizer out of a class and its arguments, what each family adds, and the schedule of a run."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainwright.interop.optional import MissingExtra
from trainwright.optim.any_precision import AnyPrecisionAdamW
from trainwright.optim.build import build_optimizer, build_scheduler
from trainwright.optim.fused_backward import is_lomo
from trainwright.optim.groups import decay_parameter_names, parameter_groups
from trainwright.optim.layerwise import LayerWiseDummyOptimizer, LayerWiseDummyScheduler
from trainwright.optim.lomo import fused_backward
from trainwright.optim.registry import check_device, optimizer_class_and_kwargs


class Model(nn.Module):
    """Small, with everything that groups tell apart: an embedding, matrices, biases, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.attn = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)  # (batch, 8)
        hidden = hidden + self.norm(self.attn(hidden))
        return nn.functional.cross_entropy(self.lm_head(hidden), (tokens + 1) % 6)


def make_args(**changes: Any) -> SimpleNamespace:
    values = {
        "optim_args": None,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-8,
        "optim_target_modules": ["attn"],
        "lr_scheduler_type": "linear",
        "lr_scheduler_kwargs": None,
        "get_warmup_steps": lambda num_training_steps: 2,
    }
    return SimpleNamespace(**(values | changes))


def make(optim: str, **changes: Any) -> tuple[Model, Any]:
    torch.manual_seed(0)
    model, args = Model(), make_args(optim=optim, **changes)
    try:
        check_device(args)
        cls, kwargs = optimizer_class_and_kwargs(args, model)
    except (MissingExtra, RuntimeError) as error:
        pytest.skip(str(error).partition(".")[0])
    optimizer = build_optimizer(
        model, cls, kwargs, parameter_groups(model, args.weight_decay, decay_parameter_names(model))
    )
    if hasattr(optimizer, "train"):  # schedule-free
        optimizer.train()
    return model, optimizer


def train(model: Model, optimizer: Any, num_steps: int) -> list[float]:
    losses = []
    for _ in range(num_steps):
        loss = model(torch.arange(6))
        losses.append(loss.item())
        if is_lomo(optimizer):
            fused_backward(optimizer, loss)
        else:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_muon_takes_the_hidden_matrices_alone() -> None:
    model, optimizer = make("muon")
    muon, adamw = optimizer.optimizers
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert [id(p) for group in muon.param_groups for p in group["params"]] == [id(model.attn.weight)]
    rest = sum(len(group["params"]) for group in adamw.param_groups)
    assert rest == len(list(model.parameters())) - 1


def test_any_precision_equals_adamw_in_float32() -> None:
    model, optimizer = make("adamw_anyprecision")
    other, adamw = make("adamw_torch")
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
    _, optimizer = make("sgd")
    args = make_args(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr_rate": 0.5}')
    schedule: Any = build_scheduler(args, optimizer, 6)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01])  # two updates of warmup
    assert rates[-1] == pytest.approx(0.005)


def test_a_schedule_argument_of_another_name_is_an_error() -> None:
    _, optimizer = make("sgd")
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
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 128))
    cls, kwargs = optimizer_class_and_kwargs(make_args(optim="adamw_bnb_8bit"), model)
    optimizer = build_optimizer(model, cls, kwargs, parameter_groups(model, 0.0, decay_parameter_names(model)))
    model(torch.arange(128)).sum().backward()
    optimizer.step()
    dtypes = [optimizer.state[parameter]["state1"].dtype for parameter in (model[0].weight, model[1].weight)]
    assert dtypes == [torch.float32, torch.uint8]


@pytest.mark.parametrize(
    "optim", ["paged_ademamix_32bit", "paged_ademamix_8bit", "paged_adamw_8bit", "paged_lion_32bit"]
)
def test_paged_optimizers_train_large_tensors_on_a_cpu(optim: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.Linear(320, 320)  # above the 100,000 numbers from which the package pages
    cls, kwargs = optimizer_class_and_kwargs(make_args(optim=optim), model)
    optimizer = build_optimizer(model, cls, kwargs, parameter_groups(model, 0.0, decay_parameter_names(model)))
    before = model.weight.detach().clone()
    model(torch.ones(1, 320)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
