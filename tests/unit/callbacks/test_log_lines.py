"""A log line in a terminal: its columns, its width, its colours."""

import io
import math
import re
import sys

import pytest
from tqdm.utils import disp_len

from trainwright.callbacks.log_lines import log_line, readable_value, takes_colour
from trainwright.state import TrainerState

STATE = TrainerState(global_step=5, max_steps=6000, epoch=0.25, num_train_epochs=12)
TRAINING = {"loss": 0.125, "grad_norm": 12.3456, "learning_rate": 4.9871e-05, "epoch": 0.25}
EVALUATION = {"eval_loss": 0.25, "eval_f1": 0.5, "eval_runtime": 754.0, "eval_samples_per_second": 1234.5}


class Output(io.StringIO):
    """A terminal, or none."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_line_of_training_fits_eighty_columns() -> None:
    line = log_line(TRAINING, STATE, width=80)
    assert line == "   5/6000  epoch  0.25  loss    0.1250  grad_norm     12.35  lr 4.987e-05"
    assert "\n" not in line


@pytest.mark.parametrize("width", [1, 12, 20, 33, 60, 300])
@pytest.mark.parametrize("has_colour", [False, True])
def test_no_line_is_wider_than_the_terminal_and_no_value_is_left_out(width: int, has_colour: bool) -> None:
    logs = {**TRAINING, **EVALUATION, "note": "x" * 90, "准确率": 0.5}
    head = log_line({}, STATE, width)
    text = plain(log_line(logs, STATE, width, has_colour))
    for line in text.split("\n"):
        assert disp_len(line) <= max(width, disp_len(head) + disp_len("  epoch  0.25"))
    if width >= 33:
        assert {"0.1250", "0.5000", "12:34"} <= set(text.split())
    assert ("\n" in text) == (width < 300)


def test_speeds_come_last_with_their_units() -> None:
    logs = {"eval_runtime": 1.2, "eval_samples_per_second": 1234.5, "eval_steps_per_second": 77.21, "eval_loss": 0.25}
    assert log_line(logs, STATE, 120).endswith("eval_loss    0.2500  1.20 s  1,234 samples/s  77.2 steps/s")


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0.000"), (-0.5, "-0.5000"), (1234.4, "1234"), (1e10, "1.000e+10"), (math.inf, "inf"), (True, "True"),
        (None, "None"), ("two\nlines", "two lines"), ([1, 2], "[1, 2]"),
    ],
)  # fmt: skip
def test_a_value_is_short_and_on_one_line(value: object, text: str) -> None:
    assert readable_value(value) == text


@pytest.mark.parametrize("value", [0.125, 123.456, 9999.6, 12345.6, 4.9871e-05, -0.001, 999999.0, 1e-12, 5e20])
def test_a_short_value_is_the_value(value: float) -> None:
    assert float(readable_value(value).replace(",", "")) == pytest.approx(value, rel=5e-4)


def test_what_is_not_finite_is_red() -> None:
    assert "\x1b[1;31mloss       nan\x1b[0m" in log_line({"loss": math.nan}, STATE, 80, colour=True)


def test_the_epoch_of_the_first_pass_over_a_stream_is_left_out() -> None:
    state = TrainerState(global_step=5, max_steps=20, epoch=0.25, num_train_epochs=sys.maxsize)
    assert log_line({"loss": 0.5, "epoch": 0.25}, state, 80) == " 5/20  loss    0.5000"
    state.epoch = 1.25
    assert log_line({"loss": 0.5, "epoch": 1.25}, state, 80) == " 5/20  epoch 1.25  loss    0.5000"


@pytest.mark.parametrize(
    "environment, on_terminal, elsewhere",
    [
        ({}, True, False),
        ({"TERM": "xterm"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colours_are_for_terminals_and_obey_the_conventions(
    environment: dict[str, str], on_terminal: bool, elsewhere: bool
) -> None:
    assert takes_colour(Output(True), environment) == on_terminal
    assert takes_colour(Output(False), environment) == elsewhere
