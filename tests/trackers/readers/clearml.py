"""ClearML: the files of an offline session, which `Task.import_offline_session` sends to a server."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import battery

SUMMARY = "Summary"  # the title of single values


class Reader(battery.Reader):
    name = "clearml"
    distribution = "clearml"
    sends_within_s = 6.0  # its reporter writes every five seconds
    calls_per_step = 16  # it replaces `__import__`, which imports within functions call: four in a step

    def environment(self, folder: Path) -> dict[str, str]:
        return {"CLEARML_OFFLINE_MODE": "1", "CLEARML_CACHE_DIR": str(folder / "clearml"), "CLEARML_LOG_MODEL": "true"}

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        return [_stored(session) for session in sessions(folder)]


def sessions(folder: Path) -> list[Path]:
    """The directory of each session, oldest first."""
    found = folder.glob("clearml/offline/offline-*/task.json")
    return sorted((file.parent for file in found), key=lambda path: first_event(path)["timestamp"])


def task_of(session: Path) -> dict[str, Any]:
    task: dict[str, Any] = json.loads((session / "task.json").read_text())
    return task


def events_of(session: Path) -> list[dict[str, Any]]:
    """The scalars, in their order."""
    file = session / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event for line in lines for event in json.loads(line)]


def first_event(session: Path) -> dict[str, Any]:
    return next(iter(events_of(session)), {"timestamp": 0})


def properties_of(task: dict[str, Any]) -> dict[str, str]:
    """The user properties."""
    return {name: entry["value"] for name, entry in task["hyperparams"].get("properties", {}).items()}


def _stored(session: Path) -> battery.StoredRun:
    task = task_of(session)
    scalars: dict[str, list[tuple[int | None, float]]] = {}
    for event in events_of(session):
        if "variant" in event:
            scalars.setdefault(f"{event['metric']}/{event['variant']}", []).append((event["iter"], event["value"]))
    parameters = {name: entry["value"] for name, entry in task["hyperparams"].get("Transformers", {}).items()}
    configuration = task["configuration"].get("Model Configuration", {}).get("value", "")
    for line in configuration.splitlines():
        name, separator, value = line.partition("=")
        if separator:
            parameters.setdefault(name.strip(), value.strip().strip('"'))
    artifacts: dict[str, list[str]] = {}
    for artifact in task["execution"]["artifacts"]:
        with zipfile.ZipFile(artifact["uri"]) as archive:
            artifacts[artifact["key"]] = archive.namelist()
    properties = properties_of(task)
    for alias in ("last", "best"):
        if f"checkpoint_{alias}" in properties:
            artifacts[f"checkpoint:{alias}"] = artifacts[properties[f"checkpoint_{alias}"]]
    group = next(iter(task.get("tags") or []), None)
    return battery.StoredRun(
        task.get("comment") or task["name"], properties.get("status", "running"), scalars, parameters, artifacts, group
    )
