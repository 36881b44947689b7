"""Trackio: its SQLite files, through its own `SQLiteStorage`."""

from __future__ import annotations

import re
from pathlib import Path

import battery


class Reader(battery.Reader):
    name = "trackio"
    distribution = "trackio"
    lacks = {"finished": "the package keeps no status; a run that fails or is stopped has an alert"}
    sends_within_s = 3.0  # its thread sends twice a second

    def environment(self, folder: Path) -> dict[str, str]:
        return {"TRACKIO_DIR": str(folder / "trackio"), "TRACKIO_LOG_MODEL": "checkpoint"}

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        from trackio.sqlite_storage import SQLiteStorage

        runs = []
        for project in SQLiteStorage.get_projects():
            for record in sorted(SQLiteStorage.get_run_records(project), key=lambda record: record["created_at"]):
                scalars: dict[str, list[tuple[int | None, float]]] = {}
                for line in SQLiteStorage.get_logs(project, record["name"], run_id=record["id"]):
                    for name, value in line.items():
                        if name not in ("step", "timestamp"):
                            scalars.setdefault(name, []).append((line["step"], value))
                config = SQLiteStorage.get_run_config(project, record["name"], run_id=record["id"]) or {}
                alerts = SQLiteStorage.get_alerts(project, run_id=record["id"])  # the newest first
                ends = [re.fullmatch(r"Training (\w+)", alert["title"]) for alert in alerts]
                status = next((end[1] for end in ends if end), None)
                artifacts = {}
                for link in SQLiteStorage.get_run_artifacts(project, record["name"], record["id"])["output"]:
                    version = SQLiteStorage.get_artifact_manifest(project, link["name"], f"v{link['version']}")
                    paths = sorted(entry["path"] for entry in version["manifest"])
                    artifacts.update({f"{link['name']}:{alias}": paths for alias in version["aliases"]})
                runs.append(
                    battery.StoredRun(record["name"], status, scalars, config, artifacts, group=config.get("_Group"))
                )
        return runs
