"""What only Comet does: whose source it uploads, which files, the step it remembers, its variables."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import scenarios
from battery import needs, program, reader_of, stored
from readers.comet_ml import experiments, uploads
from scenarios import At, trainer

NAME = "comet_ml"
KEY = "k" * 40
pytestmark = pytest.mark.xdist_group(NAME)


@pytest.fixture
def reader():
    needs(NAME)
    return reader_of(NAME)


def test_each_trial_uploads_the_files_of_its_own_directory(reader, tmp_path):
    program(reader, tmp_path, lambda: scenarios.search(reader))
    trials = stored(reader, tmp_path)
    assert len(trials) == 2
    for number, trial in enumerate(trials):
        files = {file for files in trial.artifacts.values() for file in files}
        assert f"run-{number}/checkpoint-2/model.safetensors" in files
        assert {Path(file).parts[0] for file in files} == {f"run-{number}"}


def test_the_uploaded_source_is_the_script_of_the_user(reader, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("made.train()\n")

    def action():
        sys.modules["__main__"].__file__ = str(script)
        trainer(reader, max_steps=2).train()

    program(reader, tmp_path, action)
    ((_, messages),) = experiments(tmp_path)
    assert list(uploads(messages, "source_code")) == [str(script)]


@pytest.mark.parametrize("assets", ["TRUE", "FALSE"])
def test_the_files_of_output_dir_are_sent_with_best_and_last_unless_the_variable_says_no(assets, reader, tmp_path):
    def action():
        made = trainer(reader, "first", metric_for_best_model="loss")
        made.train()
        return Path(made.state.best_model_checkpoint).name

    best = program(reader, tmp_path, action, {"COMET_LOG_ASSETS": assets})
    ((_, messages),) = experiments(tmp_path)
    aliases = {
        Path(name).parent.name: payload["metadata"]["aliases"]
        for name, payload in uploads(messages).items()
        if name.endswith("model.safetensors") and payload["metadata"]
    }
    expected = {"checkpoint-6": ["last"]}
    expected[best] = ["best", *expected.get(best, [])]
    assert aliases == (expected if assets == "TRUE" else {})
    assert ("out-first/checkpoint-2/model.safetensors" in uploads(messages)) == (assets == "TRUE")


def test_log_lines_leave_the_step_of_other_calls_alone(reader, tmp_path):
    def action():
        import comet_ml

        def log():
            comet_ml.get_running_experiment().log_metric("mine", 1.0)

        trainer(reader, callbacks=(At(3, log),)).train()

    program(reader, tmp_path, action)
    (run,) = stored(reader, tmp_path)
    assert run.scalars["mine"] == [(None, 1.0)]
    assert [step for step, _ in run.scalars["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_an_experiment_of_the_user_is_logged_into_and_left_open(reader, tmp_path):
    def action():
        import comet_ml

        theirs = comet_ml.start(project_name="theirs")
        theirs.set_name("theirs")
        trainer(reader).train()
        assert not theirs.ended
        theirs.log_metric("mine", 2.0)
        theirs.end()

    program(reader, tmp_path, action)
    (run,) = stored(reader, tmp_path)
    assert (run.name, run.status, run.scalars["mine"]) == ("theirs", "finished", [(None, 2.0)])
    assert len(run.scalars["train/loss"]) == 6


def test_a_training_that_failed_and_is_resumed_has_each_point_once(reader, tmp_path):
    run, losses = scenarios.failed_and_resumed(reader, tmp_path)
    assert run.scalars["train/loss"] == losses
    assert len(experiments(tmp_path)) == 2 and run.status == "finished"


def two_trainings(reader, tmp_path, **variables):
    """The descriptions of the experiments of two trainings in one process."""

    def action():
        for name in ("first", "second"):
            trainer(reader, name, max_steps=2, save_strategy="no").train()

    program(reader, tmp_path, action, variables)
    return [meta for meta, _ in experiments(tmp_path)]


@pytest.mark.parametrize("mode", ["create", "get", "get_or_create", None])
def test_mode_and_key_say_which_experiment_the_first_training_has(mode, reader, tmp_path):
    variables = {"COMET_EXPERIMENT_KEY": KEY, **({"COMET_MODE": mode} if mode else {})}
    first, second = two_trainings(reader, tmp_path, **variables)
    assert (first["offline_id"], first["resume_strategy"]) == (KEY, mode or "get_or_create")
    assert second["offline_id"] != KEY and second["resume_strategy"] == "create"


def test_a_project_is_named_and_without_a_key_each_training_is_new(reader, tmp_path):
    first, second = two_trainings(reader, tmp_path, COMET_PROJECT_NAME="mine")
    assert first["project_name"] == second["project_name"] == "mine"
    assert first["offline_id"] != second["offline_id"]


def test_an_experiment_that_must_exist_needs_its_key(reader, tmp_path):
    def action():
        with pytest.raises(RuntimeError, match="'comet_ml' could not start"):
            trainer(reader).train()

    program(reader, tmp_path, action, {"COMET_MODE": "get", "COMET_LOGGING_CONSOLE": "CRITICAL"})


def test_offline_wins_over_the_newer_variable_and_disabled_writes_nothing(reader, tmp_path):
    def action():
        trainer(reader, max_steps=2).train()

    program(reader, tmp_path / "offline", action, {"COMET_MODE": "OFFLINE", "COMET_START_ONLINE": "1"})
    assert len(experiments(tmp_path / "offline")) == 1
    program(reader, tmp_path / "disabled", action, {"COMET_MODE": "DISABLED"})
    assert experiments(tmp_path / "disabled") == []


def test_online_asks_the_server_and_one_that_refuses_ends_no_training(reader, tmp_path):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.send_error(401)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def action():
        made = trainer(reader, max_steps=2, save_strategy="no")
        made.train()
        return made.state.global_step

    variables = {
        "COMET_MODE": "ONLINE",
        "COMET_API_KEY": "a" * 25,
        "COMET_URL_OVERRIDE": f"http://127.0.0.1:{server.server_port}/clientlib/",
        "COMET_LOGGING_CONSOLE": "CRITICAL",
    }
    assert program(reader, tmp_path, action, variables) == 2
    server.shutdown()
    assert asked and experiments(tmp_path) == []
