"""Comet: the zip files of offline experiments. Those with one key are one experiment, as `comet upload` has it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import battery


class Reader(battery.Reader):
    name = "comet_ml"
    distribution = "comet_ml"
    lacks = {"resume": "the package writes when an experiment ends: what an offline process has that crashes is lost"}

    def environment(self, folder: Path) -> dict[str, str]:
        return {
            "COMET_START_ONLINE": "0",
            "COMET_OFFLINE_DIRECTORY": str(folder / "comet"),
            "COMET_AUTO_LOG_CO2": "false",  # of CodeCarbon, which asks the network where it is
            "COMET_LOGGING_CONSOLE": "ERROR",
        }

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        runs: dict[str, battery.StoredRun] = {}
        for meta, messages in experiments(folder):
            run = runs.setdefault(meta["offline_id"], battery.StoredRun(None, None, {}, {}))
            others = {m["payload"]["key"]: m["payload"]["value"] for m in messages if m["type"] == "log_other"}
            run.name = others.get("Name", run.name)
            run.group = next(iter(meta["tags"]), run.group)
            error = meta["customer_error_message"]
            run.status = "finished" if error is None else "killed" if "interrupted" in error else "failed"
            for message in messages:
                if message["type"] == "metric_msg":
                    metric = message["payload"]["metric"]
                    point = metric["step"], metric["metricValue"]
                    run.scalars.setdefault(metric["metricName"], []).append(point)
                elif message["type"] == "parameter_msg":  # "params": of lists
                    param = message["payload"].get("param") or message["payload"]["params"]
                    run.parameters[param["paramName"]] = param["paramValue"]
            for name, upload in uploads(messages).items():
                aliases = (upload.get("metadata") or {}).get("aliases") or [""]
                for alias in aliases:
                    run.artifacts.setdefault(f"files:{alias}", []).append(name)
        return list(runs.values())


def experiments(folder: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The description and the messages of each archive, oldest first."""
    found = []
    for file in (folder / "comet").glob("*.zip"):
        with zipfile.ZipFile(file) as archive:
            if not archive.namelist():  # of a process that crashed
                continue
            meta = json.loads(archive.read("experiment.json"))
            found.append((meta, [json.loads(line) for line in archive.read("messages.json").splitlines()]))
    return sorted(found, key=lambda pair: pair[0]["start_time"])


def uploads(messages: list[dict[str, Any]], kind: str = "asset") -> dict[str, dict[str, Any]]:
    """The files that an upload would send, by their names: `kind` is "asset" or "source_code"."""
    payloads = [message["payload"] for message in messages if message["type"] == "file_upload"]
    return {payload["additional_params"]["fileName"]: payload for payload in payloads if payload["upload_type"] == kind}
