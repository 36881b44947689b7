"""Adafactor against the paper's arithmetic, against the installed transformers, and through a save."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

from trainwright.optim.adafactor import Adafactor, AdafactorSchedule, get_adafactor_schedule

SHAPES = [(6, 4), (5,), (3, 4, 2), ()]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"warmup_init": True},
    {"scale_parameter": False},
    {"beta1": 0.9, "weight_decay": 0.1},
    {"lr": 1e-2, "relative_step": False},
    {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "clip_threshold": 0.5, "decay_rate": -0.5},
    {"lr": 1e-2, "relative_step": False, "eps": (1e-8, 1e-1), "beta1": 0.5, "weight_decay": 0.01},
]


def make_parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def take_steps(optimizer: torch.optim.Optimizer, parameters: list[Any], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def test_a_step_of_a_matrix_is_the_one_of_the_paper() -> None:
    value, gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.1, -0.2], [0.3, 0.4]])
    parameter = torch.nn.Parameter(value.clone())
    parameter.grad = gradient
    Adafactor([parameter]).step()
    squared = gradient**2 + 1e-30
    row, column = squared.mean(dim=1), squared.mean(dim=0)  # at the first step nothing is remembered: 1 - 1 ** -0.8 = 0
    update = gradient / torch.sqrt(torch.outer(row, column) / row.mean())
    update /= max(1.0, update.pow(2).mean().sqrt().item())
    rate = 1e-2 * value.pow(2).mean().sqrt()
    torch.testing.assert_close(parameter.data, value - rate * update)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
def test_ten_steps_equal_the_installed_transformers(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    reference = pytest.importorskip("transformers.optimization").Adafactor
    ours, theirs = make_parameters(dtype), make_parameters(dtype)
    optimizer, other = Adafactor(ours, **kwargs), reference(theirs, **kwargs)
    for step in range(10):
        take_steps(optimizer, ours, step, step + 1)
        take_steps(other, theirs, step, step + 1)
        for mine, expected in zip(ours, theirs):
            torch.testing.assert_close(mine, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
def test_the_state_of_the_installed_transformers_continues_here(kwargs: dict[str, Any]) -> None:
    reference = pytest.importorskip("transformers.optimization").Adafactor
    theirs = make_parameters()
    other = reference(theirs, **kwargs)
    take_steps(other, theirs, 0, 3)
    ours = [torch.nn.Parameter(parameter.detach().clone()) for parameter in theirs]
    optimizer = Adafactor(ours, **kwargs)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    take_steps(other, theirs, 3, 6)
    take_steps(optimizer, ours, 3, 6)
    for mine, expected in zip(ours, theirs):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    assert [state.keys() for state in optimizer.state.values()] == [state.keys() for state in other.state.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_identical(dtype: torch.dtype) -> None:
    whole = make_parameters(dtype)
    optimizer = Adafactor(whole, beta1=0.9)
    take_steps(optimizer, whole, 0, 4)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in whole]
    second = Adafactor(resumed, beta1=0.9)
    second.load_state_dict(state)
    take_steps(optimizer, whole, 4, 8)
    take_steps(second, resumed, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))


def test_the_constructor_has_the_documented_arguments() -> None:
    defaults = {name: p.default for name, p in inspect.signature(Adafactor).parameters.items() if name != "params"}
    assert defaults == {
        "lr": None,
        "eps": (1e-30, 1e-3),
        "clip_threshold": 1.0,
        "decay_rate": -0.8,
        "beta1": None,
        "weight_decay": 0.0,
        "scale_parameter": True,
        "relative_step": True,
        "warmup_init": False,
    }


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": 1e-3}, "lr=0.001 cannot be combined with relative_step=True"),
        ({"warmup_init": True, "relative_step": False}, "requires relative_step=True"),
    ],
)
def test_contradicting_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adafactor(make_parameters(), **kwargs)


def test_sparse_gradients_are_refused() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        Adafactor(embedding.parameters()).step()


def test_the_schedule_reports_the_rate_that_the_optimizer_used() -> None:
    parameters = make_parameters()
    optimizer = Adafactor(parameters, warmup_init=True)
    schedule = get_adafactor_schedule(optimizer, initial_lr=0.3)
    assert isinstance(schedule, AdafactorSchedule)
    assert schedule.get_last_lr() == [0.3]
    for step in range(3):
        size = parameters[0].detach().pow(2).mean().sqrt().item()
        take_steps(optimizer, parameters, step, step + 1)
        schedule.step()
        optimizer.zero_grad()
        assert float(schedule.get_last_lr()[0]) == pytest.approx(1e-6 * (step + 1) * size)
    assert schedule.state_dict()["last_epoch"] == 3


def test_the_schedule_leaves_the_training_as_it_is() -> None:
    plain, watched = make_parameters(), make_parameters()
    first, second = Adafactor(plain), Adafactor(watched)
    schedule = AdafactorSchedule(second)
    for step in range(3):
        take_steps(first, plain, step, step + 1)
        take_steps(second, watched, step, step + 1)
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched))
