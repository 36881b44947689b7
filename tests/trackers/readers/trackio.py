"""Trackio: its SQLite files, through its own `SQLiteStorage`."""

from __future__ import annotations

import re
from pathlib import Path

import battery


class Reader(battery.Reader):
    name = "trackio"
    distribution = "trackio"
    lacks = {
        "finished": "the package keeps no status; a run that fails or is stopped has an alert",
        "artifacts": "nothing of Trackio's or of its integration asks for them",
    }
    sends_within_s = 3.0  # its thread sends twice a second

    def environment(self, folder: Path) -> dict[str, str]:
        return {"TRACKIO_DIR": str(folder / "trackio")}

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
                runs.append(battery.StoredRun(record["name"], status, scalars, config, group=config.get("_Group")))
        return runs
