"""The text of `optim_args`: splitting, typing, and errors that name the likely intention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainwright.optim.options import parse_optim_args, typed, with_options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("a=1", {"a": "1"}),
        (" a = 1 , b=x,", {"a": "1", "b": "x"}),
        ("betas=(0.9, 0.95),eps=1e-6", {"betas": "(0.9, 0.95)", "eps": "1e-6"}),
        ("betas=[0.9,0.95]", {"betas": "[0.9,0.95]"}),
    ],
)
def test_text_splits_at_commas_outside_brackets(text: str | None, expected: dict[str, str]) -> None:
    assert parse_optim_args(text) == expected


@pytest.mark.parametrize("text", ["momentum", "a=1=2", "=1", "a="])
def test_an_item_without_one_equals_sign_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="is not of the form name=value"):
        parse_optim_args(text)


@pytest.mark.parametrize(
    ("text", "like", "expected"),
    [
        ("True", False, True),
        ("0", True, False),
        ("64", 128, 64),
        ("0.9", 0, 0.9),
        ("1", 0.5, 1.0),
        ("(0.9,0.95)", (0.1, 0.2), (0.9, 0.95)),
        ("0.9;0.95", (0.1, 0.2), (0.9, 0.95)),
        ("std", "x", "std"),
        ("true", None, True),
        ("0.5", None, 0.5),
        ("None", None, None),
        ("word", None, "word"),
    ],
)
def test_values_take_the_type_of_the_default(text: str, like: Any, expected: Any) -> None:
    value = typed("name", text, like)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "like", "kind"), [("maybe", True, "bool"), ("many", 3, "int"), ("0.9", (0.1, 0.2), "2 numbers like")]
)
def test_a_value_of_another_type_is_an_error(text: str, like: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"optim_args: name='{text}' cannot be read as {kind}"):
        typed("name", text, like)


def test_options_reach_the_constructor_with_its_types() -> None:
    options = parse_optim_args("momentum=0.9,nesterov=true,foreach=False")
    kwargs = with_options(torch.optim.SGD, {"lr": 0.1}, options, "sgd")
    assert kwargs == {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": False}


def test_an_unknown_option_lists_the_arguments_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"'sgd' has no argument 'momentun'; it takes \[.*\]\. Did you mean 'momentum'\?"
    ):
        with_options(torch.optim.SGD, {"lr": 0.1}, {"momentun": "0.9"}, "sgd")


@pytest.mark.parametrize(("name", "place"), [("lr", "learning_rate"), ("weight_decay", "weight_decay")])
def test_options_with_an_argument_of_their_own_point_there(name: str, place: str) -> None:
    with pytest.raises(ValueError, match=f"set '{name}' through {place}"):
        with_options(torch.optim.SGD, {"lr": 0.1}, {name: "0.9"}, "sgd")
