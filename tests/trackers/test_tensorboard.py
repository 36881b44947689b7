"""TensorBoard: where its files go, a writer of the user's, what a resumed training replaces."""

from __future__ import annotations

import pytest

import scenarios
from battery import needs, program, stored
from readers import tensorboard as reading

pytestmark = pytest.mark.xdist_group("tensorboard")
READER = reading.Reader()
SHORT = {"save_strategy": "no", "eval_strategy": "no", "max_steps": 2}


@pytest.fixture(autouse=True)
def installed():
    needs("tensorboard")


def names(folder):
    return [run.name for run in stored(READER, folder)]


def test_files_go_to_the_directory_of_the_variable_else_of_the_argument_else_of_the_run(tmp_path):
    def action():
        import os

        scenarios.trainer(READER, **SHORT).train()
        scenarios.trainer(READER, **SHORT, logging_dir="chosen").train()
        os.environ["TENSORBOARD_LOGGING_DIR"] = "elsewhere"
        scenarios.trainer(READER, **SHORT, logging_dir="chosen").train()

    program(READER, tmp_path, action)
    default, *others = names(tmp_path)
    assert default.startswith("out-first/runs/") and others == ["chosen", "elsewhere"]


def test_each_training_of_a_process_has_a_directory_of_its_own(tmp_path):
    def action():
        made = scenarios.trainer(READER, **SHORT, logging_dir="logs")
        made.train()
        made.train()
        scenarios.trainer(READER, "other", **SHORT, logging_dir="logs").train()

    program(READER, tmp_path, action)
    assert names(tmp_path) == ["logs", "logs-2", "logs-3"]


def test_a_writer_of_the_user_is_used_and_stays_open(tmp_path):
    def action():
        from torch.utils.tensorboard import SummaryWriter

        from trainwright.tracking.tensorboard import TensorBoardCallback

        writer = SummaryWriter("given")
        made = scenarios.trainer(READER, None, (TensorBoardCallback(writer),), **SHORT, report_to="none")
        made.train()
        writer.add_scalar("theirs", 1.0, 9)
        writer.close()
        return made.state.log_history

    history = program(READER, tmp_path, action)
    (run,) = stored(READER, tmp_path)
    assert run.name == "given" and run.scalars["theirs"] == [(9, 1.0)]
    assert [step for step, _ in run.scalars["train/loss"]] == [line["step"] for line in history if "loss" in line]
