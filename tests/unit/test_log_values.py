"""What becomes of the values of a log line that JSON does not hold."""

import datetime
import decimal
import enum
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trainwright.log_values import MOST_CHARACTERS, MOST_DEPTH, MOST_ELEMENTS, plain_line
from trainwright.state import TrainerState

MOMENT = datetime.datetime(2020, 1, 2, 3, 4, 5)


class Color(str, enum.Enum):
    RED = "red"


class Broken:
    shape, tolist = (2,), None

    def __str__(self):
        raise RuntimeError("no text")


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


QUIET = {
    "tensor of one element": (torch.tensor([0.5]), 0.5),
    "tensor that needs gradients": (torch.ones((), requires_grad=True), 1.0),
    "bfloat16": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "numpy float": (np.float32(0.5), 0.5),
    "numpy int": (np.int64(3), 3),
    "numpy bool": (np.bool_(True), True),
    "numpy text": (np.str_("a"), "a"),
    "fraction of decimals": (decimal.Decimal("0.5"), 0.5),
    "enum of texts": (Color.RED, "red"),
    "tuple": ((1, 2.5, "a", None), [1, 2.5, "a", None]),
    "nested": ({"a": {"b": np.float32(0.5)}}, {"a": {"b": 0.5}}),
    "keys that are numbers": ({1: "a", (2, 3): "b"}, {"1": "a", "[2, 3]": "b"}),
    "half a surrogate pair": ("\ud800", "\ud800"),
}
NAMED = {
    "tensor": (torch.tensor([1.0, 2.0]), [1.0, 2.0], "a Tensor of shape (2,)"),
    "array": (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]], "a ndarray of shape (2, 2)"),
    "no element": (torch.zeros(0), [], "a Tensor of shape (0,)"),
    "array of objects": (np.array([MOMENT, {3}], dtype=object), [MOMENT.isoformat(), [3]], "a ndarray of shape (2,)"),
    "too many": (torch.zeros(MOST_ELEMENTS + 1), f"<Tensor of shape ({MOST_ELEMENTS + 1},)>", "a Tensor of shape"),
    "no device": (torch.zeros(2, device="meta"), "<Tensor>", "which cannot be read"),
    "set": ({3, 1, 2}, [1, 2, 3], "a set"),
    "set of all kinds": (frozenset({"a", 1}), [1, "a"], "a set"),
    "bytes": (b"ab\xff", "ab\\xff", "bytes"),
    "moment": (MOMENT, "2020-01-02T03:04:05", "a datetime"),
    "numpy moment": (np.datetime64("2020-01-02T03:04:05"), "2020-01-02T03:04:05", "a datetime"),
    "path": (Path("a"), "a", "an object of type"),
    "complex": (1 + 2j, "(1+2j)", "an object of type complex"),
    "broken": (Broken(), "<Broken>", "a value of type Broken, which cannot be read"),
    "long text": (type("Long", (), {"__str__": lambda self: "x" * 5000})(), "x" * MOST_CHARACTERS, "type Long"),
    "huge number": (10**400, hex(10**400), "a number beyond every float"),
    "inside": ({"a": [1, {2}]}, {"a": [1, [2]]}, "a set"),
}


def as_read(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("case", QUIET)
def test_what_json_can_say_is_written_without_a_word(case):
    value, expected = QUIET[case]
    plain, changed = plain_line({"key": value})
    assert as_read(plain) == {"key": expected} and changed == {}


@pytest.mark.parametrize("case", NAMED)
def test_what_json_cannot_say_is_written_as_near_as_it_gets_and_named(case):
    value, expected, words = NAMED[case]
    plain, changed = plain_line({"loss": 1.0, "key": value})
    if isinstance(expected, str):
        assert as_read(plain)["key"].startswith(expected)
        assert len(plain["key"]) < MOST_CHARACTERS + 50
    else:
        assert as_read(plain)["key"] == expected
    assert changed.keys() == {"key"} and words in changed["key"]


def test_nan_and_infinity_stay_numbers_of_the_history():
    plain, changed = plain_line({"a": float("nan"), "b": np.float64("inf"), "c": torch.tensor(-math.inf)})
    assert math.isnan(plain["a"]) and (plain["b"], plain["c"]) == (math.inf, -math.inf) and changed == {}
    assert {type(value) for value in plain.values()} == {float}


def test_what_contains_itself_or_is_very_deep_has_an_end():
    circle = []
    circle.append(circle)
    for value in (circle, nested(5000)):
        plain, changed = plain_line({"key": value})
        assert json.dumps(plain).count("[") == MOST_DEPTH and f"deeper than {MOST_DEPTH}" in changed["key"]


def test_keys_that_are_no_texts_become_texts():
    assert plain_line({1: 2, ("a", "b"): 3, None: 4, torch.tensor(5): 6})[0] == {
        "1": 2, "['a', 'b']": 3, "None": 4, "5": 6
    }  # fmt: skip


# -- through the Trainer -----------------------------------------------------------------------------------------------


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "The value logged as" in record.getMessage()]


def test_a_run_that_logs_odd_values_saves_ends_and_resumes(make_trainer, tmp_path, caplog):
    from trainwright import TrainerCallback

    class LogsOdd(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.log({case: row[0] for case, row in NAMED.items()} | {("a", 1): state.global_step})

    trainer = make_trainer(max_steps=3, save_strategy="steps", save_steps=1, trainer={"callbacks": [LogsOdd()]})
    trainer.train()
    trainer.save_state()
    assert len(warnings_of(caplog)) == len(NAMED)  # once for each name, in three steps
    for case in NAMED:
        assert sum(f"logged as {case!r} " in warning for warning in warnings_of(caplog)) == 1
    for place in ("checkpoint-3", "."):
        history = json.loads((tmp_path / "out" / place / "trainer_state.json").read_text())["log_history"]
        odd = [line for line in history if "set" in line]
        assert [line["['a', 1]"] for line in odd] == [1, 2, 3]
        assert all(line["set"] == [1, 2, 3] and line["tensor"] == [1.0, 2.0] for line in odd)
    again = make_trainer(max_steps=4, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.log_history[: len(history) - 1] == history[:-1]


def test_callbacks_receive_the_value_that_was_logged(make_trainer):
    from trainwright import TrainerCallback

    class Sees(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs["key"])

    seen, value = [], torch.ones(3)
    trainer = make_trainer(trainer={"callbacks": [Sees()]})
    trainer.log({"key": value})
    assert seen == [value] or seen[0] is value
    assert trainer.state.log_history == [{"key": [1.0, 1.0, 1.0], "step": 0}]


def test_an_odd_value_that_another_way_put_into_the_history_is_saved_and_named_once(tmp_path, caplog):
    state = TrainerState(log_history=[{"key": torch.ones(2), 3: "three", "step": 1}])
    for _ in range(2):
        state.save_to_json(tmp_path / "state.json")
    assert json.loads((tmp_path / "state.json").read_text())["log_history"] == [
        {"key": [1.0, 1.0], "3": "three", "step": 1}
    ]
    assert len(warnings_of(caplog)) == 1 and "'key' is a Tensor of shape (2,)" in caplog.text
    assert TrainerState.load_from_json(tmp_path / "state.json").log_history[0]["key"] == [1.0, 1.0]


def test_only_the_first_process_warns_of_a_value(caplog):
    state = TrainerState(is_world_process_zero=False)
    state.add_log_line({"key": {1}})
    assert warnings_of(caplog) == []
