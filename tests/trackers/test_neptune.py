"""What only Neptune does: types of fields, its arguments, what it drops."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from battery import needs, program, reader_of, stored
from readers.neptune import offline_runs
from scenarios import trainer
from trainwright import TrainerCallback
from trainwright.tracking.neptune import NeptuneCallback
from warned import warned

NAME = "neptune"
pytestmark = pytest.mark.xdist_group(NAME)


@pytest.fixture
def reader():
    needs(NAME)
    return reader_of(NAME)


def trained(reader, folder, constructor, **arguments):
    """What one training with these arguments of the callback leaves: the run and its operations."""
    reader.constructor = constructor
    program(reader, folder, lambda: trainer(reader, **arguments).train() and None)
    (run,) = stored(reader, folder)
    (operations,) = offline_runs(folder)
    return run, operations


def test_a_second_training_in_a_run_keeps_the_fraction_of_a_value_that_was_zero(reader, tmp_path):
    reader.constructor = {}

    def action():
        import neptune

        with neptune.init_run(name="theirs") as run:
            for name, decay, dropout in (("first", 0, 0), ("second", 0.1, 0.25)):
                made = trainer(reader, name, (NeptuneCallback(run=run),), weight_decay=decay, report_to="none")
                made.model.config.attention_dropout = dropout
                made.train()
            assert run.get_state() == "started"
            run["mine"] = 1

    program(reader, tmp_path, action)
    (run,) = stored(reader, tmp_path)
    assert (run.name, run.status) == ("theirs", "finished")
    assert run.parameters["trainer_parameters/weight_decay"] == 0.1
    assert run.parameters["model_parameters/attention_dropout"] == 0.25
    (operations,) = offline_runs(tmp_path)
    kinds = [op["type"] for op in operations if op["path"][-1] in ("weight_decay", "attention_dropout")]
    assert kinds == ["AssignFloat"] * 4


def logged_at_each_step(reader, tmp_path, values):
    """(warnings, the stored run) of a training of two steps in which a callback logs `values` at each."""

    class Logs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.made.log(values)

    def action():
        logs = Logs()
        logs.made = trainer(reader, callbacks=(logs,), max_steps=2)
        return warned(logs.made.train)

    messages = program(reader, tmp_path, action)
    (run,) = stored(reader, tmp_path)
    return messages, run


def test_nan_and_infinity_which_it_drops_are_warned_of_and_cost_no_other_value(reader, tmp_path):
    values = {"nan": float("nan"), "inf": float("inf"), "finite": 0.5}
    messages, run = logged_at_each_step(reader, tmp_path, values)
    assert run.scalars["train/finite"] == [(1, 0.5), (2, 0.5)] and "train/nan" not in run.scalars
    for name in ("nan", "inf"):
        assert len([message for message in messages if f"does not get train/{name}:" in message]) == 1


def test_a_value_below_one_that_is_a_curve_is_warned_of_and_cost_no_other_value(reader, tmp_path):
    messages, run = logged_at_each_step(reader, tmp_path, {"a/b/c": 1.0, "a/b": 2.0, "other": 0.5})
    assert run.scalars["train/other"] == [(1, 0.5), (2, 0.5)] and run.scalars["train/a/b/c"][0] == (1, 1.0)
    assert len([message for message in messages if "does not get a/b" in message]) == 1


def test_name_namespace_and_further_arguments_reach_the_run(reader, tmp_path):
    given = {"name": "mine", "base_namespace": "/deep/er/", "description": "words", "log_parameters": False}
    run, operations = trained(reader, tmp_path, given, max_steps=2)
    assert run.name == "mine" and "deep/er/train/loss" in run.scalars
    assert [op["value"] for op in operations if op["path"] == ["sys", "description"]] == ["words"]
    assert not [op for op in operations if "trainer_parameters" in op["path"] or "model_parameters" in op["path"]]


@pytest.mark.parametrize("mode", ["same", "last", "best", None])
def test_the_checkpoints_are_uploaded_that_log_checkpoints_names(mode, reader, tmp_path):
    run, operations = trained(reader, tmp_path, {"log_checkpoints": mode}, metric_for_best_model="loss")
    places = {
        "same": ["checkpoints/checkpoint-2", "checkpoints/checkpoint-4", "checkpoints/checkpoint-6"],
        "last": ["checkpoints/last"],
        "best": ["checkpoints/best"],
        None: [],
    }[mode]
    assert sorted(run.artifacts) == places
    for place in places:
        assert {f"{place}/model.safetensors", f"{place}/optimizer.pt"} <= set(run.artifacts[place])
    saves = 3 if mode in ("same", "last") else 1 if mode else 0
    assert len([op for op in operations if op["path"][-1:] == ["model.safetensors"]]) == saves or mode != "last"


def test_an_unknown_way_to_upload_is_refused_with_the_nearest(reader):
    with pytest.raises(ValueError, match=r"log_checkpoints='lst' must be one of.*Did you mean 'last'"):
        NeptuneCallback(log_checkpoints="lst")


@pytest.mark.parametrize("mode, value", [("best", "xyz")])
def test_the_token_is_never_part_of_an_error(mode, value, reader, tmp_path):
    reader.constructor = {"api_token": "not-a-real-token", "project": "team/project", "mode": "async"}

    def action():
        with pytest.raises(RuntimeError, match="'neptune' could not start") as error:
            trainer(reader).train()
        return str(error.value)

    assert "not-a-real-token" not in program(reader, tmp_path, action)


class Refuses(BaseHTTPRequestHandler):
    """A server that knows nobody."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_error(401)

    def log_message(self, *_):
        pass


def test_the_token_of_the_variable_says_which_server_is_asked_and_is_no_part_of_its_error(reader, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    token = base64.b64encode(
        json.dumps({"api_address": address, "api_url": address, "key": "x" * 40}).encode()
    ).decode()
    reader.constructor = {"mode": "async"}

    def action():
        with pytest.raises(RuntimeError, match="'neptune' could not start") as error:
            trainer(reader).train()
        return str(error.value)

    said = program(reader, tmp_path, action, {"NEPTUNE_API_TOKEN": token, "NEPTUNE_PROJECT": "team/mine"})
    server.shutdown()
    assert Refuses.asked and token not in said


def test_the_project_is_that_of_the_variable_unless_an_argument_names_one(reader, tmp_path):
    def action():
        from neptune.internal.backends.neptune_backend_mock import NeptuneBackendMock
        from neptune.metadata_containers import metadata_container

        asked = []

        class Backend(NeptuneBackendMock):
            def get_project(self, project_id):
                asked.append(str(project_id))
                return super().get_project(project_id)

        metadata_container.get_backend = lambda **_: Backend()
        for arguments in ({}, {"project": "team/other"}):
            reader.constructor = {"mode": "async", **arguments}
            trainer(reader, max_steps=2, save_strategy="no").train()
        return asked

    assert program(reader, tmp_path, action, {"NEPTUNE_PROJECT": "team/mine"}) == ["team/mine", "team/other"]


def test_the_variable_names_the_run_of_the_first_training(reader, tmp_path):
    reader.constructor = {"mode": "debug"}

    def action():
        names = []
        for name in ("first", "second"):
            made = trainer(reader, name, max_steps=2)
            made.train()
            (callback,) = [c for c in made.callback_handler.callbacks if isinstance(c, NeptuneCallback)]
            names.append((callback.run_id(), callback.run._custom_run_id))
        return names

    first, second = program(reader, tmp_path, action, {"NEPTUNE_CUSTOM_RUN_ID": "of-the-user"})
    assert first == ("of-the-user", "of-the-user")
    assert second[0] == second[1] != "of-the-user"
