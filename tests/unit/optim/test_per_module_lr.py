"""Learning rates of their own for parts of a model: which parameters a pattern means, and the errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainwright import TrainingArguments
from trainwright.optim.per_module_lr import check_module_lr, pattern_of_parameters, with_module_lr


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.head = nn.Linear(2, 2)
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.head.weight


def names_of(model: nn.Module, owner: dict[int, str]) -> dict[str, str]:
    return {name: owner[id(p)] for name, p in model.named_parameters() if id(p) in owner}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head", ["head.weight", "head.bias"]),
        ("encoder.1", ["encoder.1.weight", "encoder.1.bias"]),
        (r"encoder\.[02]", ["encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"]),
        (r".*\.bias", ["encoder.0.bias", "encoder.1.bias", "encoder.2.bias", "head.bias"]),
        ("tied", ["head.weight"]),  # the same tensor under its other name
    ],
)
def test_a_pattern_is_the_whole_name_of_a_module_or_a_parameter(pattern: str, expected: list[str]) -> None:
    model = Model()
    assert names_of(model, pattern_of_parameters(model, [pattern])) == dict.fromkeys(expected, pattern)


def test_of_several_patterns_the_last_decides() -> None:
    model = Model()
    owner = names_of(model, pattern_of_parameters(model, ["encoder", "encoder.1", r".*\.bias"]))
    assert owner["encoder.0.weight"] == "encoder" and owner["encoder.1.weight"] == "encoder.1"
    assert owner["encoder.1.bias"] == owner["head.bias"] == r".*\.bias"
    assert "head.weight" not in owner


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["hed"], r"'hed' matches no parameter.*consists of \['encoder', 'head', 'tied'\]. Did you mean 'head'\?"),
        (["2.weight"], r"'2.weight' matches no parameter.* Did you mean 'encoder.2.weight'\?"),
        (["head", "encoder", "head|tied"], "'head' has no effect: later patterns decide over all it matches"),
        (["(head"], r"'\(head' is not a regular expression"),
        (["encoder.0"], "'encoder.0' matches frozen parameters only"),
    ],
)
def test_a_pattern_without_effect_is_an_error_that_says_why(patterns: list[str], message: str) -> None:
    model = Model()
    model.encoder[0].requires_grad_(False)
    with pytest.raises(ValueError, match=f"learning_rate_per_module: {message}"):
        pattern_of_parameters(model, patterns)


def test_groups_keep_what_else_they_say() -> None:
    model = Model()
    groups: list[dict[str, Any]] = [
        {"params": [*model.encoder.parameters()], "weight_decay": 0.1, "rank": 4},
        {"params": [*model.head.parameters()], "weight_decay": 0.0},
    ]
    found = with_module_lr(groups, model, {"encoder.0": 1e-3, r".*\.bias": 1e-4})
    assert [{key: value for key, value in group.items() if key != "params"} for group in found] == [
        {"weight_decay": 0.1, "rank": 4},
        {"weight_decay": 0.0},
        {"weight_decay": 0.1, "rank": 4, "lr": 1e-3},
        {"weight_decay": 0.1, "rank": 4, "lr": 1e-4},
        {"weight_decay": 0.0, "lr": 1e-4},
    ]
    assert sum(len(group["params"]) for group in found) == 8
    assert found[2]["params"][0] is model.encoder[0].weight and len(groups[0]["params"]) == 6
    assert with_module_lr(groups, model, None) is groups
    optimizer = torch.optim.SGD(found, lr=0.1)
    check_module_lr(optimizer, model, {"encoder.0": 1e-3, r".*\.bias": 1e-4})
    with pytest.raises(
        ValueError, match=r"gives 'head' the learning rate 1.0, but the optimizer \(SGD\) trains it at 0"
    ):
        check_module_lr(optimizer, model, {"head": 1.0})


@pytest.mark.parametrize("given", [{"head": 1e-3, "a": 0}, '{"head": 1e-3, "a": "0"}', {"head": "1e-3", "a": 0.0}])
def test_the_argument_takes_a_dict_or_its_json_text(given: Any, tmp_path: Any) -> None:
    rates = TrainingArguments(str(tmp_path), learning_rate_per_module=given).learning_rate_per_module
    assert rates == {"head": 1e-3, "a": 0.0} and all(type(rate) is float for rate in rates.values())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"head": -1}, ValueError, r"learning_rate_per_module\['head'\]=-1.0 is not allowed"),
        ({"head": "fast"}, ValueError, r"learning_rate_per_module\['head'\]='fast' is not a number"),
        ({"head": True}, TypeError, r"learning_rate_per_module\['head'\]=True is a bool; a number is needed"),
        ({"head": float("nan")}, ValueError, r"learning_rate_per_module\['head'\]=nan is not allowed"),
        ("head=1", ValueError, "learning_rate_per_module='head=1' is not allowed: pass a dict or a JSON text"),
        ([1], TypeError, r"learning_rate_per_module=\[1\] must be a dict or JSON text"),
    ],
)
def test_what_is_no_rate_is_named(given: Any, error: type[Exception], message: str, tmp_path: Any) -> None:
    with pytest.raises(error, match=message):
        TrainingArguments(str(tmp_path), learning_rate_per_module=given)
