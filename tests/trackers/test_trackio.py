"""Trackio: its arguments and variables, keys that begin with "_", a run of the user's."""

from __future__ import annotations

import pytest

import scenarios
from battery import needs, program, stored
from readers import trackio as reading

pytestmark = pytest.mark.xdist_group("trackio")
READER = reading.Reader()
SHORT = {"save_strategy": "no", "eval_strategy": "no", "max_steps": 2}


@pytest.fixture(autouse=True)
def installed():
    needs("trackio")


def projects():
    from trackio.sqlite_storage import SQLiteStorage

    return {project: SQLiteStorage.get_runs(project) for project in SQLiteStorage.get_projects()}


def test_the_project_is_that_of_the_argument_else_of_the_variable_else_huggingface(tmp_path):
    def action():
        import os

        scenarios.trainer(READER, "default", **SHORT).train()
        os.environ["TRACKIO_PROJECT"] = "of-the-variable"
        scenarios.trainer(READER, "variable", **SHORT).train()
        scenarios.trainer(READER, "argument", **SHORT, project="of-the-argument").train()

    program(READER, tmp_path, action)
    assert program(READER, tmp_path, projects) == {
        "huggingface": ["default"],
        "of-the-variable": ["variable"],
        "of-the-argument": ["argument"],
    }


def test_keys_of_the_configuration_that_begin_with_an_underscore_arrive(tmp_path):
    def action():
        made = scenarios.trainer(READER, **SHORT)
        made.train()
        return {key: value for key, value in made.model.config.to_dict().items() if key.startswith("_")}

    expected = program(READER, tmp_path, action)
    (run,) = stored(READER, tmp_path)
    assert expected and {key: run.parameters[key] for key in expected} == expected


def test_two_trainings_with_one_name_are_two_runs(tmp_path):
    def action():
        for _ in range(2):
            scenarios.trainer(READER, "same", **SHORT).train()

    program(READER, tmp_path, action)
    runs = stored(READER, tmp_path)
    assert [run.name for run in runs] == ["same", "same"]
    assert [[step for step, _ in run.scalars["train/loss"]] for run in runs] == [[1, 2], [1, 2]]


def test_a_run_of_the_user_is_logged_into_and_not_ended(tmp_path):
    def action():
        import trackio

        trackio.init(project="theirs", name="mine")
        scenarios.trainer(READER, **SHORT).train()
        trackio.log({"after": 1.0})
        trackio.finish()

    program(READER, tmp_path, action)
    (run,) = stored(READER, tmp_path)
    assert run.name == "mine" and run.parameters["hidden_size"] == scenarios.HIDDEN_SIZE
    assert "after" in run.scalars and [step for step, _ in run.scalars["train/loss"]] == [1, 2]


def test_models_are_artifacts_whose_aliases_best_and_last_move_on(tmp_path):
    """The greater loss counts as better here, so that the first of two evaluations is the best."""

    def action():
        made = scenarios.trainer(READER, max_steps=4, load_best_model_at_end=True, greater_is_better=True)
        made.train()
        return made.state.best_global_step

    assert program(READER, tmp_path, action) == 2
    (run,) = stored(READER, tmp_path)
    assert {"checkpoint-first:best", "checkpoint-first:last", "model-first:best"} <= set(run.artifacts)
    assert "optimizer.pt" in run.artifacts["checkpoint-first:best"]
    assert "checkpoint_global_step_2" in str(run.artifacts) and "model-first:last" not in run.artifacts


def test_a_failed_run_has_an_alert(tmp_path):
    def action():
        failing = scenarios.At(1, scenarios.fail(RuntimeError("out of luck")))
        with pytest.raises(RuntimeError, match="out of luck"):
            scenarios.trainer(READER, "failing", (failing,), **SHORT).train()

    def alerts():
        from trackio.sqlite_storage import SQLiteStorage

        return [(alert["title"], alert["level"]) for alert in SQLiteStorage.get_alerts("huggingface")]

    program(READER, tmp_path, action)
    assert program(READER, tmp_path, alerts) == [("Training failed", "error")]
