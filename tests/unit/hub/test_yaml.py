"""YAML that any reader understands as it was meant."""

import math

import pytest
import yaml

from trainwright.hub.yaml import to_yaml

VALUES = [
    "plain",
    "two words",
    "org/name-1.0",
    "yes",
    "No",
    "null",
    "1.5",
    "1e-5",
    "2024-01-01",
    "a: b",
    "# not a comment",
    "- dash",
    "trailing ",
    "",
    'quote " and \\ and \n line',
    "naïve 模型 😀",
    "\x7f\x85 \u2028 \ufeff",
    "{braces}",
    "*star",
    "@at",
    "12:30",
    "0x1F",
    1,
    -2.5,
    1e-05,
    1e22,
    True,
    None,
    [],
    {},
    math.inf,
    -math.inf,
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_as_it_was_written(value):
    for tree in ({"key": value}, {"key": [value, value]}, {"list": [{"a": {"b": value}, "c": [value]}]}):
        assert yaml.safe_load(to_yaml(tree)) == tree


def test_nan_comes_back_as_nan():
    assert math.isnan(yaml.safe_load(to_yaml({"key": math.nan}))["key"])


def test_the_order_is_kept():
    assert list(yaml.safe_load(to_yaml({"b": 1, "a": {"d": 1, "c": 2}}))) == ["b", "a"]
