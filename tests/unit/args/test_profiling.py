"""The arguments that make a run show its speed, its time and its trace."""

import pytest

from trainwright.args.reporting import parse_profile_steps
from trainwright.args.training import TrainingArguments


@pytest.mark.parametrize(
    ("written", "first", "last"),
    [
        ("10-15", 10, 15),
        ("10, 15", 10, 15),
        (" 7 ", 7, 7),
        (7, 7, 7),
        ([2, 4], 2, 4),
        ('{"first": 1, "last": 2}', 1, 2),
    ],
)
def test_profile_steps_may_be_written_in_several_ways(written, first, last):
    steps = parse_profile_steps(written)
    assert steps == {"first": first, "last": last}
    assert parse_profile_steps(steps) == steps


def test_profile_steps_may_switch_on_more():
    steps = {"first": 1, "last": 2, "shapes": True, "memory": False}
    assert TrainingArguments("out", profile_steps=steps).profile_steps == steps


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("15-10", "did you mean '10-15'"),
        ("soon", "'first' must be a step"),
        ("0-3", "'first' must be a step, counted from 1"),
        ("1-2-3", "write the first and the last step"),
        (True, "write the first and the last step"),
        (1.5, "write the first and the last step"),
        ({"first": 3}, "'last' must be a step"),
        ({"first": 1, "last": 2, "shape": True}, "no setting 'shape'.*shapes"),
        ({"first": 1, "last": 2, "shapes": "often"}, "shapes='often' is not allowed"),
    ],
)
def test_profile_steps_that_mean_nothing_are_an_error_with_a_way_out(written, message):
    with pytest.raises(ValueError, match=f"(?s)profile_steps.*{message}"):
        TrainingArguments("out", profile_steps=written)


@pytest.mark.parametrize(
    ("written", "settled"),
    [(False, False), (True, "logs"), ("true", "logs"), ("logs", "logs"), ("end", "end"), ("no", False)],
)
def test_the_time_breakdown_is_off_at_the_end_or_in_every_line(written, settled):
    arguments = TrainingArguments("out", time_breakdown=written)
    assert arguments.time_breakdown == settled
    arguments.__post_init__()
    assert arguments.time_breakdown == settled


def test_a_time_breakdown_that_means_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"time_breakdown='log' is not allowed.*logs"):
        TrainingArguments("out", time_breakdown="log")


def test_a_peak_must_be_a_number_that_something_uses():
    assert TrainingArguments("out", log_speed=True, peak_tflops_per_s="989").peak_tflops_per_s == 989
    with pytest.raises(ValueError, match="peak_tflops_per_s=0 is not allowed"):
        TrainingArguments("out", log_speed=True, peak_tflops_per_s=0)
    with pytest.raises(ValueError, match="log_speed=True, or leave it out"):
        TrainingArguments("out", peak_tflops_per_s=989)
