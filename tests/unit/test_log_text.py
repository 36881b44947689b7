"""The log history as text: the same bytes as `json.dumps`, and only what is new is encoded."""

import copy
import dataclasses
import json
import math
from random import Random

import numpy as np
import pytest
import torch

from trainwright import log_text
from trainwright.checkpoint.save import save_trainer_state
from trainwright.log_text import LogText
from trainwright.log_values import plain_value
from trainwright.state import TrainerState


def lines(number, start=0):
    return [{"step": i, "loss": i / 3, "epoch": i * 0.1, "name": f'a "{i}"\n é'} for i in range(start, start + number)]


def whole(state):
    """What encoding everything at once gives."""
    return json.dumps(state.to_dict(), indent=2, sort_keys=True, default=plain_value) + "\n"


@pytest.mark.parametrize(
    "history",
    [
        [],
        lines(3),
        [{}, {"nested": {"b": [1, {"c": 2}], "a": []}}, {"x": math.nan, "y": math.inf}],
        [{"a": np.float32(0.1), "b": torch.tensor(2.5), "c": np.int64(3), "d": np.float64(0.1)}],
        [{'\n  "log_history": []': '\n  "log_history": []'}],
    ],
)
def test_the_text_is_that_of_json_byte_for_byte(history):
    callbacks = {"Mine": {"args": {"log_history": []}, "attributes": {"text": '\n  "log_history": []'}}}
    state = TrainerState(log_history=history, stateful_callbacks=callbacks, global_step=3, best_metric=0.5)
    assert state.to_json() == whole(state)
    assert state.to_json() == whole(state)


def test_each_save_encodes_as_many_lines_as_are_new(tmp_path):
    state = TrainerState()
    for save in range(1, 6):
        state.log_history += lines(100, start=100 * save)
        before = state._log_text.num_encoded
        state.save_to_json(tmp_path / "state.json")
        assert state._log_text.num_encoded - before == 100
    state.save_to_json(tmp_path / "state.json")
    assert state._log_text.num_encoded == 500
    assert (tmp_path / "state.json").read_text() == whole(state)


def test_a_resumed_run_encodes_the_lines_it_loaded_once(tmp_path):
    TrainerState(log_history=lines(50)).save_to_json(tmp_path / "state.json")
    state = TrainerState.load_from_json(tmp_path / "state.json")
    state.to_json()
    state.log_history.append({"loss": 1.0})
    state.to_json()
    assert state._log_text.num_encoded == 51


CHANGES = {
    "a value changed": (lambda h: h[1].update(loss=-1.0), 1),
    "a value added": (lambda h: h[1].update(other=2), 1),
    "a value removed": (lambda h: h[1].pop("loss"), 1),
    "a line replaced": (lambda h: h.__setitem__(2, {"step": 9}), 1),
    "the last line removed": (lambda h: h.pop(), 0),
    "the first line removed": (lambda h: h.pop(0), 4),  # the four after it stand elsewhere now
    "a line inserted": (lambda h: h.insert(3, {"step": 9}), 3),
    "turned round": (lambda h: h.reverse(), 4),  # the one in the middle stays where it is
    "emptied": (lambda h: h.clear(), 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_lines_that_a_user_changes_are_written_as_they_are_now(name):
    change, num_encoded = CHANGES[name]
    state = TrainerState(log_history=lines(5))
    state.to_json()
    change(state.log_history)
    assert state.to_json() == whole(state)
    assert state._log_text.num_encoded == 5 + num_encoded


def test_another_list_in_its_place_is_written():
    state = TrainerState(log_history=lines(5))
    state.to_json()
    state.log_history = lines(3, start=2)
    assert state.to_json() == whole(state)
    state.log_history = tuple(lines(2))
    assert state.to_json() == whole(state)


def test_what_could_change_unseen_is_encoded_each_time():
    inner, tensor = [1, 2], torch.tensor(1.0)
    state = TrainerState(log_history=[{"list": inner}, {"a": 1}, {"tensor": tensor}])
    state.to_json()
    inner.append(3)
    tensor += 1
    assert json.loads(state.to_json())["log_history"] == [{"list": [1, 2, 3]}, {"a": 1}, {"tensor": 2.0}]
    assert state._log_text.num_encoded == 3 + 2


def test_the_memory_of_texts_is_no_part_of_a_state():
    state = TrainerState(log_history=lines(2))
    state.to_json()
    assert state == TrainerState(log_history=lines(2))
    assert "_log_text" not in state.to_dict() and "_log_text" not in repr(state)
    other = copy.deepcopy(state)
    other.log_history[0]["loss"] = 5.0
    assert other.to_json() == whole(other) and state.to_json() == whole(state)
    assert dataclasses.replace(state, global_step=4).to_json() == whole(dataclasses.replace(state, global_step=4))


def test_a_run_encodes_each_line_once_over_all_its_saves(make_trainer):
    trainer = make_trainer(max_steps=6, save_strategy="steps", save_steps=1, logging_steps=1)
    trainer.train()
    assert trainer.state._log_text.num_encoded == 6  # the last line comes after the last save
    assert len(trainer.state.log_history) == 7


def test_lines_of_an_empty_text_are_an_empty_list():
    assert LogText().update([]) + LogText().closing == b"[]"


# ------------------------------------------------------------------------------------------------------- a long log


@pytest.fixture
def short_turns(monkeypatch):
    """A log of more than eight lines counts as long."""
    monkeypatch.setattr(log_text, "MOST_COMPARED", 8)


def written(state):
    """What a save in the middle of a run writes."""
    return b"".join(state.text_parts(thoroughly=False)[:3]).decode()


def test_what_a_save_does_depends_on_the_new_lines_and_not_on_how_many_there_are():
    counts = {}
    for number in (10_000, 100_000):
        state = TrainerState(log_history=lines(number))
        state.to_json()
        for _ in range(3):
            state.log_history += lines(7)
            before = state._log_text.num_encoded, state._log_text.num_compared
            text = state.text_parts(thoroughly=False)
            after = state._log_text.num_encoded, state._log_text.num_compared
            counts.setdefault(number, []).append([b - a for a, b in zip(before, after)])
        assert b"".join(text[:3]).decode() == whole(state)
    assert counts[10_000] == counts[100_000] == [[7, log_text.MOST_COMPARED]] * 3


def test_a_late_line_that_is_changed_in_place_is_in_the_next_file_and_an_early_one_some_files_later(short_turns):
    state = TrainerState(log_history=lines(40))
    state.to_json()
    state.log_history[-2]["loss"] = -1.0
    assert written(state) == whole(state)
    state.log_history[30]["loss"] = -2.0
    saves = 1
    while written(state) != whole(state):
        saves += 1
    assert 1 < saves <= 40 // 4 + 1
    state.log_history[3]["loss"] = -3.0
    assert state.to_json() == whole(state)  # by name, or at the end of a run


@pytest.mark.parametrize("name", CHANGES)
def test_a_long_log_that_was_changed_is_written_as_it_is_after_a_turn(short_turns, name):
    state = TrainerState(log_history=lines(40))
    state.to_json()
    CHANGES[name][0](state.log_history)
    for _ in range(11):
        text = written(state)
    assert text == whole(state)


def test_lines_that_move_are_noticed_at_once(short_turns):
    for change in (lambda h: h.pop(0), lambda h: h.insert(5, {"step": 1}), lambda h: h.reverse(), lambda h: h.clear()):
        state = TrainerState(log_history=lines(40))
        state.to_json()
        change(state.log_history)
        assert written(state) == whole(state)


def test_lines_that_could_change_unseen_do_not_have_a_long_log_compared_whole(short_turns):
    state = TrainerState(log_history=[{"list": [i]} for i in range(40)])
    state.to_json()
    before = state._log_text.num_compared, state._log_text.num_encoded, state._log_text.num_rewritten
    assert written(state) == whole(state)
    after = state._log_text.num_compared, state._log_text.num_encoded, state._log_text.num_rewritten
    assert [b - a for a, b in zip(before, after)] == [8, 8, 0]


def test_any_changes_to_a_log_are_written_byte_for_byte():
    random = Random(0)
    state = TrainerState(log_history=lines(5))
    for turn in range(300):
        history = state.log_history
        for _ in range(random.randrange(4)):
            at = random.randrange(len(history) + 1)
            line = {"step": turn, "text": "x" * random.randrange(9), "list": [turn] * random.randrange(2)}
            match random.randrange(4) if history else 0:
                case 0:
                    history.insert(at, line)
                case 1:
                    history[at - 1] = line
                case 2:
                    del history[at - 1]
                case _:
                    history[at - 1]["more"] = turn
        assert state.to_json() == whole(state)


def test_the_last_save_of_a_run_compares_every_line(short_turns, tmp_path):
    state = TrainerState(log_history=lines(40), global_step=1, max_steps=2)
    save_trainer_state(tmp_path, state)
    state.log_history[20]["loss"] = -1.0
    state.global_step = 2
    save_trainer_state(tmp_path, state)
    assert (tmp_path / "trainer_state.json").read_text() == whole(state)


class Named(TrainerState):
    def to_json(self):
        return "mine"


def test_a_state_with_its_own_text_writes_that(tmp_path):
    save_trainer_state(tmp_path, Named())
    assert (tmp_path / "trainer_state.json").read_text() == "mine"


def test_a_line_that_cannot_be_encoded_costs_no_change_of_another():
    text, history = LogText(), [{"loss": 1.0}, {"loss": 2.0}]
    text.update(history)
    circle = []
    circle.append(circle)
    history[0]["loss"], history[1] = 5.0, circle
    with pytest.raises(ValueError, match="Circular"):
        text.update(history)
    history[1] = {"loss": 2.0}
    assert json.loads(bytes(text.update(history)) + text.closing) == [{"loss": 5.0}, {"loss": 2.0}]
