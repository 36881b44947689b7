"""MLflow: its variables, runs of the user's, what it refuses, and what becomes of a run when things go wrong."""

from __future__ import annotations

import functools
import logging
import os
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import scenarios
from battery import needs, program
from readers import mlflow as reading
from trainwright import TrainerCallback
from trainwright.interop.environment import EnvironmentValueError

pytestmark = pytest.mark.xdist_group("mlflow")
READER = reading.Reader()
LONG_KEY = "k" * 300
RATES = (0.01, 0.02)


@pytest.fixture(autouse=True)
def installed():
    needs("mlflow")


def trainer(name, callbacks=(), **arguments):
    arguments = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no", **arguments}
    return scenarios.trainer(READER, name, callbacks, **arguments)


@contextmanager
def variables(**values):
    os.environ.update(values)
    yield
    for name in values:
        os.environ.pop(name, None)


class Warned(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []
        logging.getLogger("trainwright").addHandler(self)

    def emit(self, record):
        self.messages.append(record.getMessage())

    def since(self):
        messages, self.messages = self.messages, []
        return messages


def search(name):
    made = trainer(name, model_init=scenarios.tiny_llama, eval_strategy="steps")
    space = lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.001, 0.1)}  # noqa: E731
    made.hyperparameter_search(space, n_trials=2, backend="optuna")


def with_runs_of_the_user():
    """Trainings around, within and after them, one after the other, each with a name of its own."""
    import mlflow

    said, ids, seen = Warned(), {}, {}

    again = trainer("again")
    for rate in RATES:
        again.args.learning_rate = rate
        again.train()
    seen["active after train()"] = mlflow.active_run()

    with mlflow.start_run(run_name="around") as run:
        ids["around"] = run.info.run_id
        for rate in RATES:
            trainer(f"in {rate}", learning_rate=rate).train()
        mlflow.log_metric("of the user", 1.0)
        seen["active within"] = mlflow.active_run().info.run_id
        seen["changed"] = said.since()
        search("inner")
        with variables(MLFLOW_NESTED_RUN="true"):
            trainer("nested").train()
        seen["active after nested"] = mlflow.active_run().info.run_id

    with mlflow.start_run(run_name="given") as run:
        ids["given"] = run.info.run_id
    with variables(MLFLOW_RUN_ID=ids["given"]):
        for rate in RATES:
            trainer(f"to given {rate}", learning_rate=rate).train()
        search("of given")
        seen["MLFLOW_RUN_ID"] = os.environ.get("MLFLOW_RUN_ID")
    trainer("after given").train()
    return ids, seen


def with_settings():
    """Odd names, variables, and what goes wrong."""
    import mlflow

    from trainwright.tracking import mlflow as ours

    said, seen = Warned(), {}
    odd = trainer("refused")
    odd.model.config.update({LONG_KEY: 1, "../up": 2, "long_text": "x" * 7000, **{f"many{n}": n for n in range(120)}})
    odd.train()
    odd.log({"../metric": 1.0, "ok": 2.0, LONG_KEY: 3.0, "yes": True})
    seen["refused"] = said.since()

    with variables(MLFLOW_TAGS='{"release": "RC1", "../bad": "x"}', MLFLOW_FLATTEN_PARAMS="1"):
        flat = trainer("flat")
        flat.model.config.update({"outer": {"inner": 5}})
        flat.train()
    with variables(MLFLOW_MAX_LOG_PARAMS="7"):
        trainer("few").train()
    with variables(HF_MLFLOW_LOG_ARTIFACTS="0"):
        trainer("no artifacts", save_strategy="steps", save_steps=2).train()
    with variables(DISABLE_MLFLOW_INTEGRATION="TRUE"):
        trainer("disabled").train()
    for name, value in (("MLFLOW_TAGS", "release=RC1"), ("MLFLOW_MAX_LOG_PARAMS", "many")):
        with variables(**{name: value}), pytest.raises(EnvironmentValueError, match=f"{name}='{value}' must be"):
            trainer(f"bad {name}").train()

    class Opens(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            mlflow.start_run(run_name="opened within", nested=True)
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer("broken", (Opens(),)).train()
    seen["left open"] = mlflow.active_run()

    said.since()
    ours.FLUSH_LIMIT_S, mlflow.flush_async_logging = 0.2, functools.partial(time.sleep, 60)
    seen["steps with a flush that hangs"] = trainer("hanging").train().global_step
    seen["hanging"] = said.since()
    return {}, seen


def outcome(action, folder):
    needs("mlflow")
    ids, seen = program(READER, folder, action)
    return SimpleNamespace(ids=ids, seen=seen, runs=found_in(folder))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return outcome(with_runs_of_the_user, tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return outcome(with_settings, tmp_path_factory.mktemp("mlflow"))


def found_in(folder):
    """What there is of each run, oldest first."""

    def read():
        client, runs = reading.stored_by_mlflow(folder)
        return [
            {
                "id": run.info.run_id,
                "name": run.info.run_name,
                "status": run.info.status,
                "experiment": client.get_experiment(run.info.experiment_id).name,
                "params": dict(run.data.params),
                "tags": dict(run.data.tags),
                "steps": {name: [p.step for p in client.get_metric_history(run.info.run_id, name)]
                          for name in run.data.metrics},
                "artifacts": [file.path for file in client.list_artifacts(run.info.run_id)],
            }
            for run in runs
        ]  # fmt: skip

    return program(READER, folder, read)


def named(told, *names):
    return [run for run in told.runs if run["name"] in names]


def parent(run):
    return run["tags"].get("mlflow.parentRunId")


def test_each_training_of_a_trainer_has_its_own_run_and_settings_and_leaves_none_active(told):
    runs = named(told, "again")
    assert [run["params"]["learning_rate"] for run in runs] == [str(rate) for rate in RATES]
    assert [run["steps"]["loss"] for run in runs] == [[1, 2], [1, 2]]
    assert told.seen["active after train()"] is None


def test_a_loop_within_a_run_of_the_user_logs_into_it_and_names_the_settings_that_changed(told):
    (run,) = [run for run in told.runs if run["id"] == told.ids["around"]]
    assert run["steps"]["loss"] == [1, 2, 1, 2] and run["steps"]["of the user"] == [0]
    assert run["params"]["learning_rate"] == str(RATES[0]) and run["status"] == "FINISHED"
    assert told.seen["active within"] == told.seen["active after nested"] == told.ids["around"]
    (warning,) = [message for message in told.seen["changed"] if "changes no setting" in message]
    assert "learning_rate" in warning and "seed" not in warning


def test_a_search_within_a_run_of_the_user_has_nested_trials(told):
    trials = [run for run in told.runs if run["name"].startswith("inner")]
    assert [parent(run) for run in trials] == [told.ids["around"]] * 2
    assert len({run["params"]["learning_rate"] for run in trials}) == 2


def test_a_nested_run_is_asked_for_by_a_variable(told):
    (run,) = named(told, "nested")
    assert parent(run) == told.ids["around"] and run["steps"]["loss"] == [1, 2]


def test_the_run_that_a_variable_names_is_continued_by_each_training_of_the_process(told):
    (run,) = [run for run in told.runs if run["id"] == told.ids["given"]]
    assert run["steps"]["loss"] == [1, 2, 1, 2] and run["name"] == "given" and run["status"] == "FINISHED"
    assert told.seen["MLFLOW_RUN_ID"] == told.ids["given"]
    trials = [run for run in told.runs if run["name"].startswith("of given")]
    assert [parent(run) for run in trials] == [told.ids["given"]] * 2
    assert len(named(told, "after given")) == 1


def test_names_and_values_that_it_refuses_are_left_out_with_a_warning_that_names_each(settings):
    (run,) = named(settings, "refused")
    assert run["status"] == "FINISHED" and run["steps"]["loss"] == [1, 2]
    assert {"many0", "many119", "seed"} <= run["params"].keys() and run["steps"].keys() >= {"ok", "yes"}
    said = [message for message in settings.seen["refused"] if "does not get" in message]
    for name in (LONG_KEY, "../up", "long_text", "../metric"):
        assert name not in run["params"] and name not in run["steps"]
        assert [name in message for message in said].count(True) == 1


def test_tags_are_a_json_object_and_settings_flat_where_a_variable_asks_for_it(settings):
    (run,) = named(settings, "flat")
    assert run["tags"]["release"] == "RC1" and run["params"]["outer.inner"] == "5"
    (other,) = named(settings, "few")
    assert "release" not in other["tags"]


def test_no_more_settings_than_a_variable_says_are_sent(settings):
    (run,) = named(settings, "few")
    assert len(run["params"]) == 7


def test_the_experiment_is_the_one_a_variable_names(settings):
    (run,) = named(settings, "few")
    assert run["experiment"] == reading.EXPERIMENT


def test_checkpoints_are_not_copied_unless_a_variable_asks_for_it(settings):
    (run,) = named(settings, "no artifacts")
    assert run["artifacts"] == [] and "checkpoint.last" not in run["tags"]


def test_what_is_disabled_or_told_nonsense_opens_no_run(settings):
    assert named(settings, "disabled", "bad MLFLOW_TAGS", "bad MLFLOW_MAX_LOG_PARAMS") == []


def test_a_run_that_a_failed_training_left_open_within_its_own_ends_with_it(settings):
    runs = named(settings, "broken", "opened within")
    assert [run["status"] for run in runs] == ["FAILED", "FAILED"] and settings.seen["left open"] is None


def test_a_queue_that_never_empties_costs_a_warning(settings):
    assert settings.seen["steps with a flush that hangs"] == 2
    assert any("takes longer than 0.2 s" in message for message in settings.seen["hanging"])


def test_a_program_that_ends_with_an_error_after_an_evaluation_leaves_a_failed_run(tmp_path):
    def action():
        trainer("evaluated").evaluate()
        raise RuntimeError("out of luck")

    program(READER, tmp_path, action, code=1)
    (run,) = found_in(tmp_path)
    assert run["status"] == "FAILED" and run["steps"]["eval_loss"] == [0]


def test_the_tags_of_the_run_name_the_last_and_the_best_checkpoint(tmp_path):
    def action():
        made = scenarios.trainer(
            READER, "best", max_steps=4, load_best_model_at_end=True, metric_for_best_model="loss",
            greater_is_better=True,
        )  # fmt: skip
        made.train()
        return {line["step"]: line["eval_loss"] for line in made.state.log_history if "eval_loss" in line}

    losses = program(READER, tmp_path, action)
    (run,) = found_in(tmp_path)
    assert run["tags"]["checkpoint.best"] == f"checkpoint-{max(losses, key=losses.get)}"
    assert run["tags"]["checkpoint.last"] == "checkpoint-4"
    assert set(run["artifacts"]) == {"checkpoint-2", "checkpoint-4"}
