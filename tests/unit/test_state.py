"""Where a run stands, through JSON and back."""

import collections
import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest
import torch

from trainwright.log_text import MOST_COMPARED
from trainwright.state import (
    ExportableState,
    TrainerControl,
    TrainerState,
    exported_states,
    interval_in_steps,
    trial_params,
)


class Patience(ExportableState):
    def __init__(self, limit=3):
        self.limit, self.waited = limit, 0

    def state(self):
        return {"args": {"limit": self.limit}, "attributes": {"waited": self.waited}}


def test_every_field_survives_json(tmp_path):
    state = TrainerState(
        epoch=1.25,
        global_step=7,
        max_steps=9,
        train_batch_size=4,
        total_flos=3e20,
        log_history=[{"loss": 0.1 + 0.2, "step": 7}],
        best_metric=-1.5,
        best_global_step=6,
        best_model_checkpoint="out/checkpoint-6",
        trial_name="a",
        trial_params={"learning_rate": 1e-3},
        stateful_callbacks={"Patience": {"args": {"limit": 2}, "attributes": {}}},
    )
    state.save_to_json(tmp_path / "state.json")
    assert TrainerState.load_from_json(tmp_path / "state.json") == state


def test_numbers_of_other_libraries_become_json_numbers(tmp_path):
    TrainerState(log_history=[{"a": np.float32(0.5), "b": torch.tensor(2), "c": np.int64(3)}]).save_to_json(
        tmp_path / "state.json"
    )
    assert json.loads((tmp_path / "state.json").read_text())["log_history"] == [{"a": 0.5, "b": 2, "c": 3}]


def test_fields_of_another_generation_are_left_out(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"global_step": 3, "from_the_future": 1}))
    assert TrainerState.load_from_json(tmp_path / "state.json") == TrainerState(global_step=3)


def test_a_file_that_holds_something_else_is_named(tmp_path):
    (tmp_path / "state.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"state\.json is damaged: it holds a list, not an object"):
        TrainerState.load_from_json(tmp_path / "state.json")


def test_lists_and_callbacks_given_as_none_or_objects_are_brought_into_shape():
    state = TrainerState(log_history=None, stateful_callbacks=None)
    assert state.log_history == [] and state.stateful_callbacks == {}
    assert TrainerState(stateful_callbacks=[Patience(5)]).stateful_callbacks == {"Patience": Patience(5).state()}
    assert TrainerState().log_history is not TrainerState().log_history


@pytest.mark.parametrize(
    ("interval", "max_steps", "steps"),
    [
        (25, 10, 25),
        (1, 10, 1),
        (0.3, 10, 3),
        (0.07, 100, 7),
        (0.25, 10, 3),
        (0.001, 10, 1),
        (500.0, 10, 500),
        (0, 10, 0),
    ],
)
def test_an_interval_below_one_is_a_share_of_the_run_rounded_up(interval, max_steps, steps):
    assert interval_in_steps(interval, max_steps) == steps


def test_intervals_are_taken_from_the_arguments_and_none_leaves_the_default():
    state = TrainerState()
    state.compute_steps(types.SimpleNamespace(logging_steps=0.1, eval_steps=None, save_steps=20), max_steps=50)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (5, 500, 20)


def test_a_run_knows_its_length_its_process_and_its_trial():
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(logging_steps=2, eval_steps=0.5, save_steps=3),
        _train_batch_size=8,
        hp_name=lambda trial: f"trial {trial.number}",
        is_local_process_zero=lambda: True,
        is_world_process_zero=lambda: False,
    )
    state = TrainerState()
    state.init_training_references(trainer, 10, 2, types.SimpleNamespace(number=4, params={"seed": 1}))
    assert (state.max_steps, state.num_train_epochs, state.train_batch_size) == (10, 2, 8)
    assert (state.is_local_process_zero, state.is_world_process_zero) == (True, False)
    assert (state.trial_name, state.trial_params) == ("trial 4", {"seed": 1})
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (2, 5, 3)
    state.init_training_references(trainer, 10, 2)
    assert (state.trial_name, state.trial_params) == (None, None)


def test_the_parameters_of_a_trial_may_be_a_dict():
    assert trial_params({"seed": 1}) == {"seed": 1} and trial_params(None) is None


def test_several_objects_of_a_class_are_a_list():
    states = exported_states([Patience(1), TrainerControl(), Patience(2), Patience(3)])
    assert states["Patience"] == [Patience(limit).state() for limit in (1, 2, 3)]
    assert states["TrainerControl"] == TrainerControl().state()


def test_an_object_without_a_state_is_named():
    with pytest.raises(TypeError, match="int has no state"):
        exported_states([3])


def test_an_exportable_object_without_state_says_what_to_write():
    class Bare(ExportableState):
        pass

    with pytest.raises(NotImplementedError, match=r"Bare is an ExportableState.*define state"):
        Bare().state()


def test_an_object_is_built_again_from_its_state():
    patience = Patience(5)
    patience.waited = 2
    again = Patience.from_state(json.loads(json.dumps(patience.state())))
    assert (again.limit, again.waited) == (5, 2)
    control = TrainerControl(should_save=True, should_training_stop=True)
    assert TrainerControl.from_state(control.state()) == control


def test_each_wish_is_reset_when_its_time_is_over():
    control = TrainerControl(*[True] * len(dataclasses.fields(TrainerControl)))
    control._new_step()
    assert control == TrainerControl(should_training_stop=True, should_epoch_stop=True)
    control._new_epoch()
    assert control == TrainerControl(should_training_stop=True)
    control._new_training()
    assert control == TrainerControl()


def test_the_text_is_that_of_json_with_sorted_fields():
    state = TrainerState(global_step=3, log_history=[{"loss": 0.5, "step": 3}], trial_params={"b": 1, "a": 2})
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    assert state.to_json() == json.dumps(fields, indent=2, sort_keys=True) + "\n"
    assert state.places_of_checkpoints == ()


def test_values_of_other_kinds_are_numbers_or_words_in_every_field():
    state = TrainerState(best_metric=np.float32(0.5), trial_params={"path": pathlib.PurePosixPath("a/b")})
    found = json.loads(state.to_json())
    assert (found["best_metric"], found["trial_params"]) == (0.5, {"path": "a/b"})


def test_a_subclass_overrides_the_file_with_either_of_its_two_methods():
    class OtherText(TrainerState):
        def to_json(self):
            return "{}"

    class OtherFile(TrainerState):
        def save_to_json(self, json_path):
            pass

    class Plain(TrainerState):
        pass

    overriding = [kind for kind in (TrainerState, Plain, OtherText, OtherFile) if kind.overrides_json()]
    assert overriding == [OtherText, OtherFile]


def test_a_log_that_is_no_list_is_written_like_one():
    lines = [{"loss": 0.5, "step": 1}, {"loss": 0.25, "step": 2}]
    assert json.loads(TrainerState(log_history=collections.deque(lines)).to_json())["log_history"] == lines


def test_of_a_long_log_all_lines_are_looked_at_again_unless_it_is_said_otherwise():
    state = TrainerState(log_history=[{"loss": 0.5} for _ in range(2 * MOST_COMPARED)])
    state.to_json()
    state.log_history[MOST_COMPARED]["loss"] = 77.0
    assert b"77.0" not in b"".join(state.text_parts(thoroughly=False)[:3])
    assert b"77.0" in b"".join(state.text_parts()[:3])


def test_the_text_says_whether_lines_that_were_there_have_changed():
    state = TrainerState(log_history=[{"loss": 0.5}])
    first = state.text_parts().version
    state.log_history.append({"loss": 0.25})
    assert state.text_parts().version == first
    state.log_history[0]["loss"] = 0.75
    assert state.text_parts().version != first
    assert TrainerState(log_history=[{"loss": 0.5}]).text_parts().version != first


def test_an_object_is_built_from_the_parts_of_a_state_that_there_are():
    assert Patience.from_state({}).limit == Patience().limit
    assert Patience.from_state({"args": {"limit": 5}}).limit == 5
    assert Patience.from_state({"attributes": {"waited": 2}}).waited == 2
    assert TrainerControl().state()["attributes"] == {}


def test_arguments_without_an_interval_leave_its_default():
    state = TrainerState()
    state.compute_steps(types.SimpleNamespace(logging_steps=5), max_steps=50)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (5, 500, 500)


def test_an_object_with_a_state_need_not_inherit():
    class Counter:
        def state(self):
            return {"args": {}, "attributes": {"count": 1}}

    assert exported_states([Counter()]) == {"Counter": Counter().state()}
