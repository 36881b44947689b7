"""What only SwanLab does: one value per name and step, signal handlers, its variables."""

from __future__ import annotations

import os
import signal

import pytest

import scenarios
from battery import needs, program, reader_of, stored
from readers.swanlab import files, records
from scenarios import At, trainer
from warned import warned

NAME = "swanlab"
pytestmark = pytest.mark.xdist_group(NAME)


@pytest.fixture
def reader():
    needs(NAME)
    return reader_of(NAME)


def starts(folder):
    """How each run was started: project, name, id, group, resume."""
    return [records(file)[0].start for file in files(folder)]


def test_an_evaluation_at_a_step_that_has_one_arrives_under_a_second_name_and_is_announced(reader, tmp_path):
    def action():
        made = trainer(reader)
        made.train()
        made.model.lm_head.weight.data.zero_()
        results = []
        messages = warned(lambda: results.append(made.evaluate()["eval_loss"]))
        return made.state.log_history, results[0], messages

    history, later, messages = program(reader, tmp_path, action)
    (run,) = stored(reader, tmp_path)
    during = [line["eval_loss"] for line in history if "eval_loss" in line][:-1]
    assert later not in during
    assert run.scalars["eval/loss"] == list(zip((2, 4, 6), during))
    assert run.scalars["eval/loss#2"] == [(6, later)]
    assert [message for message in messages if "eval/loss#2" in message and "step 6" in message]


def test_a_value_that_is_logged_again_at_its_step_makes_no_second_curve(reader, tmp_path):
    program(reader, tmp_path, lambda: trainer(reader).train() and None)
    (run,) = stored(reader, tmp_path)
    assert [step for step, _ in run.scalars["train/epoch"]] == [1, 2, 3, 4, 5, 6]  # also in each line of an evaluation
    assert not [name for name in run.scalars if "#" in name]


def test_two_trainings_in_a_run_of_the_user_have_a_curve_each_and_leave_it_open(reader, tmp_path):
    def action():
        import swanlab

        del os.environ["SWANLAB_PROJECT"]  # which the package itself cannot read
        swanlab.init(name="theirs")
        histories = []
        for name in ("first", "second"):
            made = trainer(reader, name, eval_strategy="no", save_strategy="no")
            made.train()
            histories.append([(line["step"], line["loss"]) for line in made.state.log_history if "loss" in line])
        assert swanlab.get_run().alive
        swanlab.log({"mine": 1.0}, step=7)
        swanlab.finish()
        return histories

    first, second = program(reader, tmp_path, action)
    (run,) = stored(reader, tmp_path)
    assert (run.name, run.status, run.scalars["mine"]) == ("theirs", "finished", [(7, 1.0)])
    assert (run.scalars["train/loss"], run.scalars["train/loss#2"]) == (first, second)


def test_ctrl_c_interrupts_the_training_and_the_handlers_are_put_back(reader, tmp_path):
    def action():
        seen = []

        def interrupt():
            seen.append(signal.getsignal(signal.SIGINT))
            os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a fork of a background process lacks
        with pytest.raises(KeyboardInterrupt):
            trainer(reader, callbacks=(At(3, interrupt),), save_on_signal=False).train()
        made = trainer(reader, "second")
        made.train()
        made.callback_handler.callbacks[1].close()
        return [handler is signal.default_int_handler for handler in (*seen, signal.getsignal(signal.SIGINT))]

    assert program(reader, tmp_path, action) == [True, True]
    assert [run.status for run in stored(reader, tmp_path)] == ["killed", "finished"]


def test_a_training_that_failed_and_is_resumed_has_each_point_once(reader, tmp_path):
    run, losses = scenarios.failed_and_resumed(reader, tmp_path)
    assert run.scalars["train/loss"] == losses
    assert run.status == "finished"


@pytest.mark.parametrize("resume, expected", [(None, "ALLOW"), ("never", "NEVER"), ("must", "MUST")])
def test_its_variables_name_project_run_and_whether_it_is_resumed(resume, expected, reader, tmp_path):
    from swanlab.proto.swanlab.run.v1.run_pb2 import ResumeMode

    def action():
        for name in ("first", "second"):
            trainer(reader, name, max_steps=2, resume_from_checkpoint="given").train()

    variables = {"SWANLAB_PROJECT": "mine", "SWANLAB_RUN_ID": "of-the-user"}
    if resume is not None:
        variables["SWANLAB_RESUME"] = resume
    program(reader, tmp_path, action, variables)
    first, second = starts(tmp_path)
    assert (first.project, first.id, first.name) == ("mine", "of-the-user", "first")
    assert ResumeMode.Name(first.resume).endswith(expected)
    assert second.id != "of-the-user" and ResumeMode.Name(second.resume).endswith("NEVER")


def test_the_group_of_a_search_is_that_of_the_variable(reader, tmp_path):
    program(reader, tmp_path, lambda: scenarios.search(reader), {"SWANLAB_GROUP": "mine"})
    assert {start.group for start in starts(tmp_path)} == {"mine"}


def test_the_package_that_is_disabled_writes_nothing(reader, tmp_path):
    program(reader, tmp_path, lambda: trainer(reader, max_steps=2).train() and None, {"SWANLAB_MODE": "disabled"})
    assert files(tmp_path) == []


def test_the_files_are_where_the_variable_says(reader, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    variables = {"SWANLAB_LOG_DIR": str(elsewhere)}
    program(reader, tmp_path, lambda: trainer(reader, max_steps=2).train() and None, variables)
    assert len(list(elsewhere.glob("run-*/*.swanlab"))) == 1 and files(tmp_path) == []
