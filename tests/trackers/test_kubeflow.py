"""What only Kubeflow has: a controller that asks for progress."""

from __future__ import annotations

import pytest

from battery import needs, program, reader_of
from readers.kubeflow import metrics_of, received
from scenarios import At, fail, trainer
from trainwright.state import TrainerState
from trainwright.tracking.kubeflow import status
from warned import warned

NAME = "kubeflow"
pytestmark = pytest.mark.xdist_group(NAME)


@pytest.fixture
def reader():
    needs(NAME)
    return reader_of(NAME)


def test_the_controller_learns_the_start_the_end_and_the_newest_values(reader, tmp_path):
    history = program(reader, tmp_path, lambda: (made := trainer(reader), made.train(), made.state.log_history)[-1])
    first, last = received(tmp_path)  # the steps lie less than the interval apart
    assert first["progressPercentage"] == 0 and "metrics" not in first
    assert last["progressPercentage"] == 100 and last["estimatedRemainingSeconds"] == 0
    newest = [line["eval_loss"] for line in history if "eval_loss" in line][-1]
    assert metrics_of(last)["eval_loss"] == str(newest) and "status" not in metrics_of(last)


@pytest.mark.parametrize("error, word", [(RuntimeError("out of luck"), "failed"), (KeyboardInterrupt(), "killed")])
def test_a_training_that_does_not_come_to_its_end_says_so_and_how_far_it_came(error, word, reader, tmp_path):
    def action():
        with pytest.raises(type(error)):
            trainer(reader, callbacks=(At(3, fail(error)),)).train()

    program(reader, tmp_path, action)
    last = received(tmp_path)[-1]
    assert last["progressPercentage"] == 100 * 3 // 6 and "estimatedRemainingSeconds" not in last
    assert metrics_of(last)["status"] == word and "loss" in metrics_of(last)


def test_the_variable_that_disables_it_sends_nothing(reader, tmp_path):
    (tmp_path / "received.jsonl").touch()
    variables = {"DISABLE_KUBEFLOW_INTEGRATION": "true"}
    program(reader, tmp_path, lambda: trainer(reader, max_steps=2).train() and None, variables)
    assert received(tmp_path) == []


def test_the_token_is_read_from_its_file(reader, tmp_path):
    (tmp_path / "wrong").write_text("not the token")
    (tmp_path / "received.jsonl").touch()
    messages = program(
        reader,
        tmp_path,
        lambda: warned(trainer(reader, max_steps=2).train),
        {"KUBEFLOW_TRAINER_SERVER_TOKEN": str(tmp_path / "wrong")},
    )
    assert received(tmp_path) == [] and ["401" in message for message in messages if "TrainJob" in message] == [True]


def test_a_controller_that_cannot_be_reached_costs_one_warning(reader, tmp_path):
    nowhere = {"KUBEFLOW_TRAINER_SERVER_URL": "http://127.0.0.1:9/status"}
    messages = program(reader, tmp_path, lambda: warned(trainer(reader, max_steps=2).train), nowhere)
    assert len(messages) == 1 and "TrainJob status not updated" in messages[0]


def test_outside_of_a_train_job_it_is_explained(reader, tmp_path):
    def action():
        with pytest.raises(RuntimeError, match="KUBEFLOW_TRAINER_SERVER_URL is not set"):
            trainer(reader).train()

    program(reader, tmp_path, action, {"KUBEFLOW_TRAINER_SERVER_URL": ""})


def test_the_remaining_time_is_counted_from_the_step_at_which_a_run_resumed():
    state = TrainerState(global_step=60, max_steps=100)
    values = status(state, {"loss": 0.5}, elapsed_s=30.0, first_step=50)["trainerStatus"]
    assert values["progressPercentage"] == 60
    assert values["estimatedRemainingSeconds"] == 30 / (60 - 50) * (100 - 60)
    assert values["metrics"] == [{"name": "loss", "value": "0.5"}]
    state.global_step = 100
    assert status(state, {}, 30.0, 50)["trainerStatus"]["progressPercentage"] == 99  # 100 is for the end alone
