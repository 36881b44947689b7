"""What to ask of the model for one batch, and what to keep of its answer."""

import sys
import types

import pytest
import torch

from trainwright.evaluation.predict import gives_loss, ignored_outputs, labels_in, predictions_in

A, B, LOSS = torch.ones(2, 1, requires_grad=True), torch.zeros(2), torch.tensor(0.5)


@pytest.mark.parametrize(
    ("inputs", "names", "can_return_loss", "expected"),
    [
        ({"labels": B}, ["labels"], False, True),
        ({"labels": None}, ["labels"], True, False),
        ({"start": B}, ["start", "end"], False, False),
        ({"start": B, "end": B}, ["start", "end"], False, True),
        ({}, [], True, True),
        ({}, [], False, False),
        ({"return_loss": True}, [], False, True),
        ({"return_loss": False}, [], True, False),
    ],
)
def test_there_is_a_loss_with_all_labels_or_where_none_are_needed(inputs, names, can_return_loss, expected):
    assert gives_loss(inputs, names, can_return_loss) == expected


def test_labels_are_a_tensor_a_tuple_or_none():
    inputs = {"labels": A, "end": B}
    assert torch.equal(labels_in(inputs, ["labels"]), A) and not labels_in(inputs, ["labels"]).requires_grad
    assert [torch.equal(x, y) for x, y in zip(labels_in(inputs, ["labels", "end"]), (A, B))] == [True, True]
    assert labels_in(inputs, []) is None


class Row(dict):
    """A mapping of outputs as models return it, in order."""


@pytest.mark.parametrize(
    ("outputs", "ignored", "holds_loss", "expected"),
    [
        ({"loss": LOSS, "logits": A}, [], True, A),
        ({"logits": A, "loss": LOSS, "hidden": B}, [], True, (A, B)),
        (Row(loss=LOSS, logits=A, cache=B), ["cache"], True, A),
        ({"logits": A}, [], False, A),
        ({"loss": B, "logits": A}, [], False, (B, A)),  # without labels "loss" is an output like any other
        ((LOSS, A), [], True, A),
        ((LOSS, A, B), [], True, (A, B)),
        ((A, B), [], False, (A, B)),
        ([A], [], False, A),
        (A, [], False, A),
    ],
)
def test_predictions_are_all_outputs_but_the_loss_and_what_is_ignored(outputs, ignored, holds_loss, expected):
    found = predictions_in(outputs, ignored, holds_loss)
    if isinstance(expected, tuple):
        assert len(found) == len(expected) and all(torch.equal(x, y) for x, y in zip(found, expected))
    else:
        assert torch.equal(found, expected)
    assert not any(value.requires_grad for value in (found if isinstance(found, tuple) else (found,)))


def test_the_config_of_a_model_says_what_is_no_prediction():
    config = types.SimpleNamespace(keys_to_ignore_at_inference=("past_key_values",))
    assert "past_key_values" in ignored_outputs(types.SimpleNamespace(config=config))
    config.keys_to_ignore_at_inference = ["mems"]
    assert ignored_outputs(types.SimpleNamespace(config=config)) == ["mems"]
    assert ignored_outputs(types.SimpleNamespace(config=config), ["hidden_states"]) == ["hidden_states"]
    assert ignored_outputs(types.SimpleNamespace(config=config), []) == []
    assert ignored_outputs(torch.nn.Linear(1, 1)) == []


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_ignored_under_the_names_of_older_and_newer_releases(name):
    found = ignored_outputs(torch.nn.Linear(1, 1), ["mems", name])
    assert found[:2] == ["mems", name] and set(found) == {"mems", "past_key_values", "cache"}


def test_a_config_of_transformers_that_names_nothing_has_its_cache_ignored(monkeypatch):
    config_class = type("PretrainedConfig", (), {})  # as since 5.24, without keys_to_ignore_at_inference
    monkeypatch.setitem(
        sys.modules, "transformers.configuration_utils", types.SimpleNamespace(PretrainedConfig=config_class)
    )
    model = types.SimpleNamespace(config=config_class())
    assert set(ignored_outputs(model)) == {"past_key_values", "cache"}
    model.config.keys_to_ignore_at_inference = []
    assert ignored_outputs(model) == []
