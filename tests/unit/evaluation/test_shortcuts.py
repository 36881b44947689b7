"""Work is left out only where no override and no argument needs it."""

import types

import pytest

from trainwright.evaluation.accumulator import LoopSettings
from trainwright.evaluation.shortcuts import NO_SHORTCUTS, Shortcuts, can_coalesce


def shortcuts(overridden=(), inputs_change=False, loss_is_the_models=True, **arguments):
    args = types.SimpleNamespace(**{"past_index": -1, "bf16": False, "fp16": False, **arguments})
    return Shortcuts.of_hooks(
        lambda hook: hook in overridden,
        args,
        inputs_change=inputs_change,
        loss_is_the_models=loss_is_the_models,
        coalesce=True,
    )


def left_out(chosen):
    return {name for name, value in vars(chosen).items() if value}


EVERYTHING = {"prediction_step", "prepare_inputs", "compute_loss", "coalesce"}


def test_a_plain_trainer_on_a_cpu_leaves_everything_out():
    assert left_out(shortcuts()) == EVERYTHING and left_out(NO_SHORTCUTS) == set()


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"overridden": ["prediction_step"]}, {"prediction_step"}),
        ({"overridden": ["_prepare_inputs"]}, {"prepare_inputs"}),
        ({"overridden": ["_prepare_input"]}, {"prepare_inputs"}),
        ({"overridden": ["compute_loss"]}, {"compute_loss"}),
        ({"overridden": ["compute_loss_context_manager"]}, {"compute_loss"}),
        ({"overridden": ["autocast_smart_context_manager"]}, {"compute_loss"}),
        ({"overridden": ["training_step"]}, set()),
        ({"inputs_change": True}, {"prepare_inputs"}),
        ({"loss_is_the_models": False}, {"compute_loss"}),
        ({"bf16": True}, {"compute_loss"}),
        ({"fp16": True}, {"compute_loss"}),
        ({"past_index": 0}, {"prepare_inputs", "compute_loss"}),
    ],
)
def test_what_an_override_or_an_argument_needs_is_done(changes, needed):
    assert left_out(shortcuts(**changes)) == EVERYTHING - needed


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"prediction_loss_only": True, "include_inputs": True}, True),
        ({"include_inputs": True}, False),
        ({"batch_metrics": True}, False),
        ({"concat_batches": False}, False),
    ],
)
def test_batches_are_appended_in_groups_where_nothing_sees_one_by_itself(settings, expected):
    assert can_coalesce(LoopSettings(**settings), is_distributed=False) == expected
    assert not can_coalesce(LoopSettings(**settings), is_distributed=True)
