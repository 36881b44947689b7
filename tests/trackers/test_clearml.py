"""ClearML: its variables, a task of the user's, no false zero, a task that does not close, signals."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import SimpleNamespace

import pytest

import scenarios
from battery import needs, program
from readers import clearml as reading

pytestmark = pytest.mark.xdist_group("clearml")
READER = reading.Reader()


@pytest.fixture(autouse=True)
def installed():
    needs("clearml")


def trainer(name, **arguments):
    return scenarios.trainer(
        READER, name, **{"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", **arguments}
    )


def in_one_process():
    import clearml

    from trainwright.tracking import clearml as ours

    seen = {}
    trainer("plain").train()
    os.environ.update(CLEARML_PROJECT="Mine", CLEARML_TASK="My task", CLEARML_LOG_MODEL="false")
    trainer("named", save_strategy="steps", save_steps=2).train()
    os.environ["CLEARML_LOG_MODEL"] = "true"
    best = {"eval_strategy": "steps", "metric_for_best_model": "loss"}
    odd = trainer("odd", save_strategy="steps", save_steps=2, **best)
    odd.train()
    odd.log({"not_a_number": float("nan"), "infinite": float("inf"), "huge": 2**70, "yes": True})
    odd.callback_handler.callbacks[1].close()
    seen["handlers"] = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [
        signal.default_int_handler,
        signal.SIG_DFL,
    ]
    theirs = clearml.Task.init(project_name="Theirs", task_name="theirs", reuse_last_task_id=False)
    trainer("within").train()
    seen["open"] = clearml.Task.current_task() is theirs
    theirs.close()

    messages = []

    class Warned(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    logging.getLogger("trainwright").addHandler(Warned())
    ours.CLOSE_LIMIT_S = 0.2
    hanging = trainer("hanging")
    hanging.train()
    close, clearml.Task.close = clearml.Task.close, lambda self: time.sleep(60)
    hanging.callback_handler.callbacks[1].close()
    clearml.Task.close = close
    seen["warned"] = messages
    return seen


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    needs("clearml")
    folder = tmp_path_factory.mktemp("clearml")
    seen = program(READER, folder, in_one_process)
    found = {}
    for session in reading.sessions(folder):
        task = reading.task_of(session)
        console = (session / "log.jsonl").read_text() if (session / "log.jsonl").exists() else ""
        found[task.get("comment") or task["name"]] = SimpleNamespace(
            task=task,
            points={(e["metric"], e["variant"]): e["value"] for e in reading.events_of(session) if "variant" in e},
            console=console,
            properties=reading.properties_of(task),
        )
    return SimpleNamespace(seen=seen, found=found)


def test_project_and_task_have_their_names_from_variables(told):
    plain, named = told.found["plain"].task, told.found["named"].task
    assert (plain["project_name"], plain["name"]) == ("HuggingFace Transformers", "Trainer")
    assert (named["project_name"], named["name"]) == ("Mine", "My task")


def test_checkpoints_are_uploaded_where_a_variable_asks_for_it_and_properties_name_the_last_and_the_best(told):
    assert told.found["named"].task["execution"]["artifacts"] == []
    odd = told.found["odd"]
    assert [artifact["key"] for artifact in odd.task["execution"]["artifacts"]] == ["checkpoint-2"]
    assert odd.properties["checkpoint_last"] == odd.properties["checkpoint_best"] == "checkpoint-2"


def test_nan_and_infinity_are_on_the_console_and_not_zero_on_a_curve(told):
    odd = told.found["odd"]
    assert ("train", "not_a_number") not in odd.points and ("train", "infinite") not in odd.points
    assert odd.points["train", "huge"] == float(2**70) and odd.points["train", "yes"] == 1.0
    assert "train/not_a_number is nan at step 2" in odd.console and "train/infinite is inf at step 2" in odd.console


def test_totals_are_single_values(told):
    plain = told.found["plain"]
    assert ("Summary", "train_loss") in plain.points and ("train", "train_loss") not in plain.points


def test_a_task_of_the_user_is_logged_into_and_left_open(told):
    assert told.seen["open"] and ("train", "loss") in told.found["within"].points
    assert told.found["within"].task["name"] == "theirs"


def test_the_program_can_be_interrupted_and_ended_after_a_task_is_closed(told):
    assert told.seen["handlers"]


def test_a_task_that_does_not_close_costs_a_warning(told):
    assert any("could not be ended" in message and "0.2 s" in message for message in told.seen["warned"])


@pytest.mark.parametrize(
    "status, called", [("finished", []), ("failed", ["mark_failed"]), ("killed", ["mark_stopped"])]
)
def test_a_server_learns_how_a_training_ended_after_the_task_is_closed(status, called):
    """With a task that only records what it is told, because there is no server here."""
    from trainwright.tracking.clearml import ClearMLCallback

    told = []
    callback = ClearMLCallback()
    callback._clearml_task = SimpleNamespace(
        is_offline=lambda: False,
        close=lambda: told.append("close"),
        mark_failed=lambda **_: told.append("mark_failed"),
        mark_stopped=lambda **_: told.append("mark_stopped"),
    )
    callback.end(status)
    assert told == ["close", *called]


def test_the_methods_that_say_how_a_training_ended_take_what_is_given_to_them(tmp_path):
    def action():
        import inspect

        import clearml

        return [list(inspect.signature(m).parameters) for m in (clearml.Task.mark_failed, clearml.Task.mark_stopped)]

    failed, stopped = program(READER, tmp_path, action)
    assert {"status_reason", "force"} <= set(failed) and {"status_message", "force"} <= set(stopped)
