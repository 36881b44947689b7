"""Neptune: the operations of offline runs, which `neptune sync` sends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import battery


class Reader(battery.Reader):
    name = "neptune"
    distribution = "neptune"
    lacks = {
        "killed": "a run has the flag sys/failed, and no more",
        "resume": "an offline run does not store its custom id",
    }
    constructor = {"log_checkpoints": "last"}

    def environment(self, folder: Path) -> dict[str, str]:
        return {"NEPTUNE_MODE": "offline"}

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        runs = []
        for operations in offline_runs(folder):
            run = battery.StoredRun(None, "finished", {}, {})
            runs.append(run)
            for operation in operations:
                kind, path = operation["type"], "/".join(operation["path"])
                name = path.removeprefix("finetuning/")
                if path == "sys/name":
                    run.name = operation["value"]
                elif path == "sys/failed":
                    run.status = "failed" if operation["value"] else "finished"
                elif path == "sys/group_tags":
                    run.group = operation["values"][0]
                elif kind == "LogFloats":
                    run.scalars.setdefault(name, []).extend((v["step"], v["value"]) for v in operation["values"])
                elif kind == "UploadFile":
                    run.artifacts.setdefault(name.rpartition("/")[0], []).append(name)
                elif name.startswith(("trainer_parameters/", "model_parameters/", "trial_params/")):
                    run.parameters[name] = operation["value"]
        return runs


def offline_runs(folder: Path) -> list[list[dict[str, Any]]]:
    """The operations of each run in their order, oldest run first."""
    found = {}
    for first in folder.glob(".neptune/offline/*/data-1.log"):
        logs = sorted(first.parent.glob("data-*.log"), key=lambda path: int(path.stem.partition("-")[2]))
        created_ns = (first.parent / "metadata.json").stat().st_mtime_ns
        found[created_ns] = [json.loads(line)["obj"] for log in logs for line in log.read_text().splitlines()]
    return [operations for _, operations in sorted(found.items())]
