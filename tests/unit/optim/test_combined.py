"""Several optimizers as one object: groups, state, closures, and what cannot be combined."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from trainwright import CombinedOptimizer
from trainwright.optim.layerwise import LayerWiseDummyOptimizer


def make() -> tuple[nn.Linear, CombinedOptimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    parts = [torch.optim.SGD([model.weight], lr=0.2, momentum=0.9), torch.optim.AdamW([model.bias], lr=0.1)]
    return model, CombinedOptimizer(parts)


def step(model: nn.Linear, optimizer: Any) -> None:
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_its_groups_are_those_of_the_optimizers_inside() -> None:
    _, combined = make()
    inside = [group for one in combined.optimizers for group in one.param_groups]
    assert all(mine is theirs for mine, theirs in zip(combined.param_groups, inside, strict=True))
    combined.param_groups[1]["lr"] = 0.05
    assert combined.optimizers[1].param_groups[0]["lr"] == 0.05
    assert combined.defaults["lr"] == 0.2


def test_its_state_has_the_ordinary_shape_and_returns_to_each_part() -> None:
    model, combined = make()
    for _ in range(3):
        step(model, combined)
    state, weights = copy.deepcopy((combined.state_dict(), model.state_dict()))
    assert [sorted(state["state"][number]) for number in (0, 1)] == [
        ["momentum_buffer"],
        ["exp_avg", "exp_avg_sq", "step"],
    ]
    assert [group["params"] for group in state["param_groups"]] == [[0], [1]]
    assert set(combined.state) == {model.weight, model.bias}
    other, fresh = make()
    other.load_state_dict(weights)
    fresh.load_state_dict(state)
    fresh.param_groups[0]["lr"] = combined.param_groups[0]["lr"]  # still one dict, after loading
    for _ in range(3):
        step(model, combined)
        step(other, fresh)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_a_state_with_another_number_of_groups_is_refused() -> None:
    model, combined = make()
    state = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match="has 1 parameter groups, this one has 2"):
        combined.load_state_dict(state)


def test_a_closure_is_called_once() -> None:
    model, combined = make()
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    assert combined.step(closure).item() > 0 and calls == [1]


def test_switching_reaches_those_that_keep_two_sets_of_weights() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = nn.Linear(3, 2)
    free = schedulefree.AdamWScheduleFree([model.weight], lr=0.1)
    combined = CombinedOptimizer([free, torch.optim.SGD([model.bias], lr=0.1)])
    combined.train()
    step(model, combined)
    assert free.param_groups[0]["train_mode"] is True
    combined.eval()
    assert free.param_groups[0]["train_mode"] is False


def test_what_cannot_be_combined_is_named() -> None:
    model = nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="needs at least one optimizer"):
        CombinedOptimizer([])
    with pytest.raises(TypeError, match=r"optimizers holds the class SGD; each entry must be"):
        CombinedOptimizer([torch.optim.SGD])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"shape \(2, 3\) is in two of the optimizers \(SGD and Adam\)"):
        CombinedOptimizer([sgd, torch.optim.Adam([model.weight])])
    with pytest.raises(ValueError, match="LayerWiseDummyOptimizer updates weights during the backward pass"):
        CombinedOptimizer([sgd, LayerWiseDummyOptimizer(lr=0.1)])


def test_hooks_run_as_those_of_every_optimizer() -> None:
    model, combined = make()
    calls: list[str] = []
    combined.register_step_pre_hook(lambda optimizer, args, kwargs: calls.append("before the step"))
    combined.register_step_post_hook(lambda optimizer, args, kwargs: calls.append("after the step"))
    combined.register_state_dict_pre_hook(lambda optimizer: calls.append("before writing"))
    combined.register_state_dict_post_hook(lambda optimizer, state: {**state, "note": 1})
    combined.register_load_state_dict_pre_hook(lambda optimizer, state: calls.append(f"note {state.get('note')}"))
    combined.register_load_state_dict_post_hook(lambda optimizer: calls.append("after loading"))
    step(model, combined)
    combined.load_state_dict(combined.state_dict())
    assert calls == ["before the step", "after the step", "before writing", "note 1", "after loading"]


def test_a_group_that_nobody_inside_would_step_is_refused() -> None:
    _, combined = make()
    with pytest.raises(ValueError, match="takes no further parameter group"):
        combined.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
