"""Enums that explain themselves, and the nearest of several names."""

import pytest

from trainwright import names
from trainwright.names import ExplicitEnum, HubStrategy, IntervalStrategy, OptimizerNames, SaveStrategy, closest


def test_the_nearest_name_is_suggested_and_a_far_one_is_not():
    assert closest("lerning_rate", ["learning_rate", "seed"]) == " Did you mean 'learning_rate'?"
    assert closest("zebra", ["learning_rate", "seed"]) == ""
    assert closest(SaveStrategy.BEST, []) == ""


def test_members_are_their_strings():
    assert IntervalStrategy("steps") is IntervalStrategy.STEPS == "steps"
    assert HubStrategy("all_checkpoints").value == "all_checkpoints"
    assert names.EvaluationStrategy is IntervalStrategy


def test_a_wrong_value_lists_what_is_allowed_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"'step' is not a valid SaveStrategy.*'no', 'steps', 'epoch', 'best'.*mean 'steps'"
    ):
        SaveStrategy("step")
    with pytest.raises(ValueError, match=r"Did you mean 'adamw_torch'"):
        OptimizerNames("adam_torch")


def test_no_two_members_of_an_enum_share_a_value():
    for enum in ExplicitEnum.__subclasses__():
        assert len(enum) == len(enum.__members__), enum


def test_file_names_are_plain_names():
    files = [value for name, value in vars(names).items() if name.endswith("_NAME")]
    assert len(files) == len(set(files)) > 10
    assert all("/" not in file and "." in file for file in files)
