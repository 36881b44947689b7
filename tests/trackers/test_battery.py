"""Every installed tracker, its real package, offline: what was logged is read back from what it wrote.

The main environment has tensorboard only. For the others: `pip install 'trainwright[wandb]'` and so on, in an
environment of their own; azureml-core pins packages that break clearml, so keep azureml, dagshub and flyte apart.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import socketserver
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from trainwright.args import TrainingArguments
from trainwright.state import TrainerControl, TrainerState
from trainwright.tracking.registry import TRACKERS, get_reporting_integration_callbacks, tracker_class

LOSSES = {1: 2.5, 2: 1.5}
EVAL_LOSS = 1.25
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

    def whole(self) -> None:
        self.begin()
        self.steps()
        self.end()


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
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
        "DVC_NO_ANALYTICS": "true",
        "SWANLAB_MODE": "local",
        "CODECARBON_COUNTRY_ISO_CODE": "FRA",
        "CODECARBON_ALLOW_MULTIPLE_RUNS": "True",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def tracker(name: str, **kwargs):
    """The callback, or a skip that says how to install what it needs."""
    row = TRACKERS[name]
    if row.missing:
        pytest.skip(f"needs {row.missing}: pip install 'trainwright[{row.extra}]' in an environment of its own")
    return tracker_class(name)(**kwargs)


CONSTRUCTOR = {
    "neptune": {"mode": "offline", "project": "team/project"},
    "dvclive": {"save_dvc_exp": False, "dvcyaml": False},
}
RAW_NAMES = {"mlflow": "eval_loss", "azure_ml": "eval_loss", "dagshub": "eval_loss", "dvclive": "eval/loss"}


def expected(name: str) -> set[Point]:
    """What must be found: the loss at both steps and the evaluation at the second."""
    train = "loss" if name in RAW_NAMES else "train/loss"
    evaluation = RAW_NAMES.get(name, "eval/loss")
    return {(train, step, loss) for step, loss in LOSSES.items()} | {(evaluation, max(LOSSES), EVAL_LOSS)}


@pytest.mark.parametrize("name", ["comet_ml", "wandb", "mlflow", "neptune", "clearml", "dvclive", "swanlab", "trackio", "tensorboard"])
def test_losses_and_evaluation_are_read_back_with_name_step_and_value(name, offline):
    callback = tracker(name, **CONSTRUCTOR.get(name, {}))
    run = Run(callback, offline)
    run.whole()
    callback.close()
    found = READERS[name](offline)
    assert not callback._switched_off
    assert expected(name) <= found, sorted(found, key=str)


def read_tensorboard(directory: Path) -> set[Point]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = set()
    for file in glob.glob(f"{directory}/**/events.*", recursive=True):
        events = EventAccumulator(file)
        events.Reload()
        points |= {(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    return points


def wandb_records(directory: Path):
    """The protobuf records of an offline run: a LevelDB log of 32 KiB blocks, 7 bytes of header before each piece."""
    from wandb.proto import wandb_internal_pb2

    (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    data, position, piece = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        piece += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(piece)
            piece = b""
            yield record


def read_wandb(directory: Path) -> set[Point]:
    points = set()
    for record in wandb_records(directory):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            points |= {(name, items["train/global_step"], value) for name, value in items.items()}
    return points


def read_mlflow(directory: Path) -> set[Point]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    return {
        (name, m.step, m.value)
        for run in runs
        for name in run.data.metrics
        for m in client.get_metric_history(run.info.run_id, name)
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
        decoder, text, position = json.JSONDecoder(), file.read_text(), 0
        while position < len(text):
            record, position = decoder.raw_decode(text, position)
            operation = record["obj"]
            if operation["type"] == "LogFloats":
                name = "/".join(operation["path"]).removeprefix("finetuning/")
                points |= {(name, int(v["step"]), v["value"]) for v in operation["values"]}
    return points


def clearml_archive(directory: Path) -> zipfile.ZipFile:
    (file,) = directory.glob("clearml/**/*.zip")
    return zipfile.ZipFile(file)


def read_clearml(directory: Path) -> set[Point]:
    with clearml_archive(directory) as archive:
        events = [event for line in archive.read("metrics.jsonl").splitlines() for event in json.loads(line)]
    return {(f"{e['metric']}/{e['variant']}", e["iter"], e["value"]) for e in events if "variant" in e}


def read_dvclive(directory: Path) -> set[Point]:
    points = set()
    root = directory / "dvclive" / "plots" / "metrics"
    for file in root.rglob("*.tsv"):
        name = str(file.relative_to(root).with_suffix(""))
        with open(file) as lines:
            points |= {(name, int(r["step"]), float(r[file.stem])) for r in csv.DictReader(lines, delimiter="\t")}
    return points


def read_trackio(directory: Path) -> set[Point]:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("huggingface", "battery")
    return {(name, line["step"], value) for line in logs for name, value in line.items() if isinstance(value, float)}


def read_swanlab(directory: Path) -> set[Point]:
    raise NotImplementedError(sorted(directory.rglob("swanlog/**/*")))


READERS = {
    "comet_ml": read_comet,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "neptune": read_neptune,
    "clearml": read_clearml,
    "dvclive": read_dvclive,
    "swanlab": read_swanlab,
    "trackio": read_trackio,
    "tensorboard": read_tensorboard,
}
