"""DVCLive: what it does in a Git repository, its variables, and names that are paths."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import pytest

import scenarios
from battery import needs, program
from readers import dvclive as reading

pytestmark = pytest.mark.xdist_group("dvclive")
READER = reading.Reader()
AUTHOR = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Somebody"), ("EMAIL", "somebody@example.org"))
}


@pytest.fixture(autouse=True)
def installed():
    needs("dvclive")


def git(folder, *arguments):
    subprocess.run(["git", *arguments], cwd=folder, check=True, env={**os.environ, **AUTHOR}, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """A Git repository with one commit."""
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("home\noutput-0\nresult-0\nerror-0\n")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def trainer(name="first", **arguments):
    return scenarios.trainer(
        READER, name, **{"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", **arguments}
    )


def run(folder, action, **environ):
    return program(READER, folder, action, {**AUTHOR, **environ})


def experiments(folder):
    """The names of DVC's experiments."""

    def read():
        from dvc.repo import Repo

        with Repo() as repo:
            return sorted(name for entries in repo.experiments.ls().values() for name, *_ in entries)

    return run(folder, read)


def test_a_repository_without_a_commit_costs_a_warning(tmp_path):
    git(tmp_path, "init", "-q")
    said = []

    class Warned(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    def action():
        logging.getLogger("trainwright").addHandler(Warned())
        trainer().train()
        return said

    assert any("no commit yet" in message for message in run(tmp_path, action))
    (stored,) = run(tmp_path, lambda: READER.runs(tmp_path))
    assert [step for step, _ in stored.scalars["loss"]] == [1, 2]


def test_each_training_is_an_experiment_of_the_repository_with_the_name_of_a_variable(repository):
    def action():
        os.environ["DVC_EXP_NAME"] = "mine"
        trainer().train()
        os.environ["DVC_EXP_NAME"] = "yours"
        trainer("second").train()

    run(repository, action)
    assert experiments(repository) == ["mine", "yours"]
    assert sorted(path.name for path in repository.glob("dvclive*")) == ["dvclive"]  # the first is in the experiment


@pytest.mark.parametrize(
    "value, tracked", [("true", "dvclive/artifacts/last.dvc"), ("all", "out-first.dvc"), ("0", None)]
)
def test_a_variable_says_what_dvc_tracks_of_the_model(value, tracked, repository):
    def action():
        trainer(save_strategy="steps", save_steps=2).train()

    run(repository, action, HF_DVCLIVE_LOG_MODEL=value)
    pointers = {str(path.relative_to(repository)) for path in repository.rglob("*.dvc") if path.is_file()}
    assert pointers == ({tracked} if tracked else set())
    described = (repository / "dvc.yaml").read_text()
    assert ("last:" in described) == (value == "true")


def test_a_variable_that_resumes_keeps_the_curve_of_an_earlier_program(tmp_path):
    def action():
        trainer().train()

    run(tmp_path, action)
    run(tmp_path, action, DVCLIVE_RESUME="true")
    (stored,) = run(tmp_path, lambda: READER.runs(tmp_path))
    assert [step for step, _ in stored.scalars["loss"]] == [1, 2, 1, 2]
    run(tmp_path, action)
    (stored,) = run(tmp_path, lambda: READER.runs(tmp_path))
    assert [step for step, _ in stored.scalars["loss"]] == [1, 2]


def test_a_name_that_leads_out_of_the_directory_writes_nothing_and_odd_settings_are_text(tmp_path):
    def action():
        made = trainer()
        made.model.config.odd = {"when": Path("x"), "list": [Path("y"), 1]}
        made.train()
        made.log({"../../../../up": 1.0, "fine": 2.0})

    run(tmp_path, action)
    assert list(tmp_path.rglob("up.tsv")) == []
    (stored,) = run(tmp_path, lambda: READER.runs(tmp_path))
    assert [value for _, value in stored.scalars["fine"]] == [2.0]
    assert stored.parameters["odd"] == {"when": "x", "list": ["y", 1]}


def test_a_live_of_the_user_is_logged_into_and_not_ended(tmp_path):
    def action():
        from dvclive import Live

        from trainwright.tracking.dvclive import DVCLiveCallback

        live = Live("mine")
        ended = []
        live.end = lambda: ended.append(True)
        for _ in range(2):
            scenarios.trainer(
                _Given(), "first", (DVCLiveCallback(live),), max_steps=1, save_strategy="no", eval_strategy="no"
            ).train()
        return ended

    assert run(tmp_path, action) == []
    (stored,) = run(tmp_path, lambda: READER.runs(tmp_path))
    assert stored.name == "mine" and [step for step, _ in stored.scalars["loss"]] == [1, 1]


class _Given(reading.Reader):
    name = "none"
