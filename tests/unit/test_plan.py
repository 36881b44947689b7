"""The arithmetic of epochs, updates and samples."""

import math
import sys

import pytest

from trainwright.plan import TrainingPlan, plan_training


def plan(**changes):
    values = {
        "len_dataloader": 10,
        "num_examples": 38,
        "total_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3.0,
        "max_steps": -1,
    }
    return plan_training(**{**values, **changes})


def test_a_run_in_epochs_makes_whole_passes():
    found = plan()
    assert (found.num_train_epochs, found.num_update_steps_per_epoch, found.max_steps) == (3, 5, 15)
    assert (found.num_examples, found.num_train_samples, found.len_dataloader) == (38, 3 * 38, 10)
    assert found.epoch_based


@pytest.mark.parametrize("accumulation", [1, 2, 3, 4, 7, 10, 11, 100])
def test_a_short_group_at_the_end_of_an_epoch_is_an_update_too(accumulation):
    assert plan(gradient_accumulation_steps=accumulation).num_update_steps_per_epoch == math.ceil(10 / accumulation)


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 3), (1.0, 5), (1.1, 6), (1.5, 8), (2.4, 12), (0.01, 1)])
def test_a_fraction_of_an_epoch_is_rounded_up_to_an_update(epochs, steps):
    found = plan(num_train_epochs=epochs)
    assert (found.max_steps, found.num_train_epochs) == (steps, math.ceil(epochs))
    assert found.num_train_samples == int(38 * epochs)


def test_a_binary_rounding_error_is_no_update():
    found = plan(len_dataloader=100, gradient_accumulation_steps=1, num_train_epochs=1.1)
    assert 1.1 * 100 > 110  # in binary
    assert found.max_steps == 110


@pytest.mark.parametrize(("max_steps", "epochs"), [(1, 1), (5, 1), (6, 2), (12, 3)])
def test_a_number_of_steps_wins_over_epochs(max_steps, epochs):
    found = plan(max_steps=max_steps)
    assert (found.max_steps, found.num_train_epochs, found.epoch_based) == (max_steps, epochs, False)
    assert found.num_train_samples == 8 * max_steps


def test_a_loader_without_length_is_one_pass_that_never_ends():
    found = plan(len_dataloader=None, num_examples=None, max_steps=7)
    assert (found.num_train_epochs, found.num_update_steps_per_epoch, found.max_steps) == (sys.maxsize, 7, 7)
    assert (found.len_dataloader, found.num_examples, found.num_train_samples) == (None, 7 * 8, 7 * 8)


def test_a_loader_without_length_needs_a_number_of_steps():
    with pytest.raises(ValueError, match=r"max_steps must be positive.*num_train_epochs=3\.0"):
        plan(len_dataloader=None, num_examples=None)


def test_no_batch_at_all_names_the_two_causes():
    with pytest.raises(ValueError, match=r"train_dataset is empty.*dataloader_drop_last=True"):
        plan(len_dataloader=0)


def test_unknown_samples_are_estimated_from_the_updates():
    assert plan(num_examples=None).num_examples == 5 * 8


def test_a_plan_cannot_be_changed():
    with pytest.raises(AttributeError):
        plan().max_steps = 3


def test_a_plan_is_the_documented_tuple_of_seven():
    plan = plan_training(
        len_dataloader=5, num_examples=18, total_train_batch_size=8, gradient_accumulation_steps=2, num_train_epochs=2,
        max_steps=-1,
    )  # fmt: skip
    epochs, updates, examples, samples, epoch_based, len_dataloader, max_steps = plan
    assert (epochs, updates, examples, samples, epoch_based, len_dataloader) == (2, 3, 18, 36, True, 5)
    assert max_steps == epochs * updates


def test_a_plan_is_taken_as_it_is_and_made_of_a_plain_tuple():
    plan = TrainingPlan(2, 3, 18, 36, True, 5, 6)
    assert TrainingPlan.of(plan) is plan
    assert TrainingPlan.of((2, 3, 18, 36, True, 5, 6)) == plan
