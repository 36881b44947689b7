"""MLflow: a SQLite database, through `MlflowClient`."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import battery
import forked

EXPERIMENT = "Tests"


class Reader(battery.Reader):
    name = "mlflow"
    distribution = "mlflow"
    imported_once = ("mlflow",)
    sends_within_s = 1.0

    def environment(self, folder: Path) -> dict[str, str]:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "mlflow.db").exists():
            shutil.copy(_empty_database(), folder / "mlflow.db")
        return {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_EXPERIMENT_NAME": EXPERIMENT,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "HF_MLFLOW_LOG_ARTIFACTS": "true",
        }

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        client, found = stored_by_mlflow(folder)
        return [_stored(client, run) for run in found]

    def scalar(self, name: str) -> str:
        return name


def stored_by_mlflow(folder: Path) -> tuple[Any, list[Any]]:
    """A client, and all runs as the package returns them, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    return client, sorted(found, key=lambda run: run.info.start_time)


def _stored(client: Any, run: Any) -> battery.StoredRun:
    run_id, tags = run.info.run_id, run.data.tags
    scalars = {
        name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        for name in run.data.metrics
    }
    artifacts: dict[str, list[str]] = {}
    for directory in client.list_artifacts(run_id):
        artifacts[directory.path] = [file.path for file in client.list_artifacts(run_id, directory.path)]
    for alias in ("last", "best"):
        if f"checkpoint.{alias}" in tags:
            artifacts[f"checkpoint:{alias}"] = artifacts[tags[f"checkpoint.{alias}"]]
    group = tags.get("mlflow.parentRunId") or tags.get("search")
    return battery.StoredRun(
        run.info.run_name, run.info.status.lower(), scalars, dict(run.data.params), artifacts, group
    )


@functools.cache
def _empty_database() -> Path:
    """Made once, because MLflow makes its tables in dozens of steps."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def make(_: int) -> None:
        from mlflow import MlflowClient

        os.chdir(folder)
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()

    (ended,) = forked.start([{"MLFLOW_DISABLE_TELEMETRY": "true"}], make, folder, limit_s=battery.LIMIT_S)
    assert ended.code == 0, ended.output + ended.error
    return folder / "mlflow.db"
