"""Every installed tracker, its real package, offline: what was logged is read back from what it wrote.

The main environment has tensorboard only. For the others: `pip install 'trainwright[wandb]'` and so on, in an
environment of their own; azureml-core pins packages that break clearml, so keep azureml, dagshub and flyte apart.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model

from trainwright import TrainerCallback
from trainwright.args import TrainingArguments
from trainwright.checkpoint.manifest import write_manifest
from trainwright.interop.trackers import TRACKERS
from trainwright.state import TrainerControl, TrainerState
from trainwright.tracking.base import tracker_class

LOSSES = {1: 2.5, 2: 1.5}
EVAL_LOSS = 1.25
TEST_LOSS = 3.25
Point = tuple[str, int, float]  # name, step, value


class Run:
    """A training of two steps as the loop tells it to a callback."""

    def __init__(self, callback, directory: Path) -> None:
        self.callback = callback
        self.args = TrainingArguments(str(directory / "out"), report_to=[], run_name="battery", use_cpu=True)
        self.state = TrainerState(max_steps=2)
        self.model = torch.nn.Linear(2, 2)

    def event(self, name: str, **kwargs) -> None:
        getattr(self.callback, name)(self.args, self.state, TrainerControl(), model=self.model, **kwargs)

    def log(self, logs: dict) -> None:
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.event("on_log", logs=logs)

    def begin(self) -> None:
        self.event("on_init_end")
        self.event("on_train_begin")

    def steps(self) -> None:
        for step, loss in LOSSES.items():
            self.state.global_step, self.state.epoch = step, step / 2
            self.event("on_step_end")
            self.log({"loss": loss, "learning_rate": 0.1 / step, "epoch": step / 2})
        self.log({"eval_loss": EVAL_LOSS, "epoch": 1.0})

    def end(self) -> None:
        self.log({"train_runtime": 9.0, "train_loss": 2.0, "total_flos": 7.0, "epoch": 1.0})
        self.event("on_train_end")
        self.callback.training_ended("finished")

    def save(self) -> Path:
        """Write a checkpoint of the current step and tell the callback."""
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        directory.mkdir(parents=True)
        save_model(self.model, str(directory / "model.safetensors"))
        torch.save({}, directory / "optimizer.pt")
        self.event("on_save")
        return directory

    def whole(self) -> None:
        self.begin()
        self.steps()
        self.end()


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Iterator[Path]:
    """A working directory of its own, and every tracker told to stay on this machine."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("WANDB_", "COMET_", "MLFLOW_", "CLEARML_", "NEPTUNE_", "SWANLAB_", "TRACKIO_", "DVC")):
            monkeypatch.delenv(name)
    settings = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "CLEARML_OFFLINE_MODE": "1",
        "CLEARML_CACHE_DIR": str(tmp_path / "clearml"),
        # Its reporter is forked otherwise, and a fork of a process with the threads of the other trackers may hang.
        "CLEARML__DEVELOPMENT__REPORT_USE_SUBPROCESS": "false",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "DVC_NO_ANALYTICS": "true",
        "SWANLAB_MODE": "local",
        "CODECARBON_COUNTRY_ISO_CODE": "FRA",
        "CODECARBON_ALLOW_MULTIPLE_RUNS": "True",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    forget_directories()


def forget_directories() -> None:
    """Packages keep the first directory or experiment they saw until the process ends; the next test has its own."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].tracking.fluent._active_experiment_id = None


def tracker(name: str, **kwargs):
    """The callback, or a skip that says how to install what it needs."""
    row = TRACKERS[name]
    if row.missing:
        pytest.skip(f"needs {row.missing}: pip install 'trainwright[{row.extra}]' in an environment of its own")
    if name == "clearml":
        # Else it forks git from a thread, which may hang among the threads that other trackers left in this process.
        import clearml

        clearml.Task.force_store_standalone_script()
    return tracker_class(name)(**kwargs)


CONSTRUCTOR = {
    "neptune": {"mode": "offline", "project": "team/project"},
    "dvclive": {"save_dvc_exp": False, "dvcyaml": False},
}
# MLflow keeps the names of the log line, DVCLive has its own; the others group them.
NAMES = {"mlflow": ("loss", "eval_loss", "test_loss"), "dvclive": ("loss", "eval/loss", "test_loss")}


def expected(name: str) -> set[Point]:
    """What must be found: the loss at both steps, the evaluation at the second, the test that followed training."""
    train, evaluation, test = NAMES.get(name, ("train/loss", "eval/loss", "test/loss"))
    last = max(LOSSES)
    return {(train, step, loss) for step, loss in LOSSES.items()} | {
        (evaluation, last, EVAL_LOSS),
        (test, last, TEST_LOSS),
    }


def comet_messages(directory: Path) -> list[dict]:
    (file,) = directory.glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        return [json.loads(line) for line in archive.read("messages.json").splitlines()]


def read_comet(directory: Path) -> set[Point]:
    metrics = [m["payload"]["metric"] for m in comet_messages(directory) if m["type"] == "metric_msg"]
    return {(m["metricName"], m["step"], m["metricValue"]) for m in metrics}


def read_neptune(directory: Path) -> set[Point]:
    points = set()
    for file in directory.glob(".neptune/offline/**/data-*.log"):
        for line in file.read_text().splitlines():
            operation = json.loads(line)["obj"]
            if operation["type"] == "LogFloats":
                name = "/".join(operation["path"]).removeprefix("finetuning/")
                points |= {(name, v["step"], v["value"]) for v in operation["values"]}
    return points


def read_swanlab(directory: Path) -> set[Point]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (file,) = directory.glob("swanlog/run-*/*.swanlab")
    reader = DataStoreReader()
    reader.open(str(file))
    records = [Record.FromString(data) for data in reader]
    scalars = [record.scalar for record in records if record.WhichOneof("record_type") == "scalar"]
    return {(scalar.key, scalar.step, scalar.value.number) for scalar in scalars}


# Comet


@pytest.mark.parametrize("assets", ["TRUE", "FALSE"])
def test_comet_sends_settings_and_the_files_of_output_dir_unless_told_not_to(assets, offline, monkeypatch):
    monkeypatch.setenv("COMET_LOG_ASSETS", assets)
    run = Run(tracker("comet_ml"), offline)
    run.model.config = {"hidden_size": 8}
    run.begin()
    run.steps()
    run.save()
    run.end()
    run.callback.close()
    messages = comet_messages(offline)
    params = [m["payload"].get("param", {}) for m in messages if m["type"] == "parameter_msg"]
    settings = {p.get("paramName"): p.get("paramValue") for p in params}
    assert settings["args/seed"] == run.args.seed and settings["config/hidden_size"] == 8
    uploads = json.dumps([m["payload"] for m in messages if m["type"] == "file_upload"])
    assert ("optimizer.pt" in uploads) == (assets == "TRUE")


def test_comet_disabled_by_its_older_variable_sends_nothing(offline, monkeypatch):
    monkeypatch.setenv("COMET_MODE", "DISABLED")
    Run(tracker("comet_ml"), offline).whole()
    assert list(offline.glob("*.zip")) == []


# Neptune


@pytest.mark.parametrize("mode, place", [("same", "checkpoint-2"), ("last", "last"), ("best", "best"), (None, None)])
def test_neptune_uploads_the_checkpoints_that_log_checkpoints_names(mode, place, offline):
    run = Run(tracker("neptune", log_checkpoints=mode, base_namespace="mine", **CONSTRUCTOR["neptune"]), offline)
    run.begin()
    run.steps()
    run.state.best_model_checkpoint = str(directory := run.save())
    write_manifest(directory, run.state.global_step, 1, {})  # only a whole checkpoint is sent as the best
    run.end()
    assert not run.callback._switched_off
    run.callback.close()
    text = "".join(file.read_text() for file in offline.glob(".neptune/offline/**/data-*.log"))
    paths = {tuple(json.loads(line)["obj"].get("path", ())) for line in text.splitlines()}
    assert ("mine", "trainer_parameters", "seed") in paths
    uploaded = {path[2:] for path in paths if path[:2] == ("mine", "checkpoints")}
    files = {"model.safetensors", "optimizer.pt"} | ({"manifest.json"} if mode == "best" else set())
    assert uploaded == ({(place, name) for name in files} if place else set())


def test_neptune_refuses_an_unknown_upload_mode():
    tracker("neptune")
    with pytest.raises(ValueError, match=r"log_checkpoints='lst' must be one of.*Did you mean 'last'"):
        tracker("neptune", log_checkpoints="lst")


# CodeCarbon


def test_codecarbon_writes_the_energy_of_each_training(offline):
    run = Run(tracker("codecarbon"), offline)
    run.log({"eval_loss": 1.0})  # before training: nothing to measure yet
    assert run.callback.tracker is None
    run.whole()
    run.state.log_history.clear()
    run.whole()
    with open(Path(run.args.output_dir) / "emissions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert all(row["country_iso_code"] == "FRA" and float(row["duration"]) > 0 for row in rows)


def test_a_run_measured_by_codecarbon_alone_on_its_machine_ends_with_a_checkpoint(offline, make_trainer, monkeypatch):
    tracker("codecarbon")
    monkeypatch.setenv("CODECARBON_ALLOW_MULTIPLE_RUNS", "False")

    class Signals(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(trainer={"callbacks": [Signals()]}, report_to="codecarbon")
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + signal.SIGTERM
    assert (Path(trainer.args.output_dir) / "checkpoint-2" / "manifest.json").is_file()


# SwanLab


def test_swanlab_keeps_project_and_settings(offline, monkeypatch):
    monkeypatch.setenv("SWANLAB_PROJECT", "mine")
    run = Run(tracker("swanlab"), offline)
    run.whole()
    project = run.callback._swanlab.get_run()
    run.callback.close()
    (config,) = offline.glob("swanlog/run-*/files/config.yaml")
    assert "seed:" in config.read_text()
    assert project is not None and b"mine" in next(offline.glob("swanlog/run-*/*.swanlab")).read_bytes()


# Kubeflow: no package, a server


@pytest.fixture
def controller(tmp_path, monkeypatch):
    """A controller that keeps what it receives, and the variables it sets in a pod."""
    received: list[tuple[str | None, dict]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.headers["Authorization"], json.loads(body)["trainerStatus"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("pod-token\n")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"http://127.0.0.1:{server.server_port}/status")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    yield received
    server.shutdown()
    server.server_close()


def test_kubeflow_learns_the_start_the_end_and_the_metrics(controller, tmp_path):
    run = Run(tracker("kubeflow"), tmp_path)
    run.whole()
    (token, first), (_, last) = controller  # the steps lie less than the interval apart
    assert token == "Bearer pod-token"
    assert first["progressPercentage"] == 0 and "metrics" not in first
    assert last["progressPercentage"] == 100 and last["estimatedRemainingSeconds"] == 0
    assert {"name": "eval_loss", "value": str(EVAL_LOSS)} in last["metrics"]


def test_kubeflow_status_counts_the_remaining_time_from_the_step_it_resumed_at():
    from trainwright.tracking.kubeflow import status

    state = TrainerState(global_step=60, max_steps=100)
    values = status(state, {"loss": 0.5}, elapsed_s=30.0, first_step=50)["trainerStatus"]
    assert values["progressPercentage"] == 60
    assert values["estimatedRemainingSeconds"] == 30 / (60 - 50) * (100 - 60)
    assert values["metrics"] == [{"name": "loss", "value": "0.5"}]
    state.global_step = 100
    assert status(state, {}, 30.0, 50)["trainerStatus"]["progressPercentage"] == 99  # 100 is for the end alone


def test_kubeflow_that_cannot_be_reached_costs_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://127.0.0.1:9/status")
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_TOKEN", raising=False)
    Run(tracker("kubeflow"), tmp_path).whole()
    assert len([r for r in caplog.records if r.name.startswith("trainwright")]) == 1


def test_kubeflow_outside_of_a_train_job_is_explained(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    with pytest.raises(RuntimeError, match="KUBEFLOW_TRAINER_SERVER_URL is not set"):
        Run(tracker("kubeflow"), tmp_path).begin()


# Flyte: apart from the others


def test_flyte_syncs_checkpoints_and_shows_the_history_in_a_task(offline):
    from trainwright.tracking.flyte import log_history_table

    callback = tracker("flyte")
    from flytekit import current_context, task

    seen: dict = {}

    @task(enable_deck=True)
    def train() -> int:
        run = Run(callback, offline)
        run.begin()
        run.steps()
        run.save()
        run.end()
        seen["saved"] = {path.name for path in Path(current_context().checkpoint._checkpoint_dest).rglob("*.*")}
        seen["decks"] = {deck.name: deck.html for deck in current_context().decks}
        seen["table"] = log_history_table(run.state.log_history)
        return run.state.global_step

    assert train() == max(LOSSES)
    assert not callback._switched_off
    assert {"model.safetensors", "optimizer.pt"} <= seen["saved"]
    assert seen["table"] in seen["decks"]["Log History"] and f"<td>{EVAL_LOSS}</td>" in seen["table"]


def test_flyte_outside_of_a_task_is_explained(offline):
    with pytest.raises(RuntimeError, match="within a Flyte task only"):
        Run(tracker("flyte"), offline).begin()
