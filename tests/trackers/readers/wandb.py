"""Weights & Biases: the `.wandb` files of offline runs, protobuf records of the package. One id is one run."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import battery


class Reader(battery.Reader):
    name = "wandb"
    distribution = "wandb"
    sends_within_s = 3.0  # the file is written once a second

    def environment(self, folder: Path) -> dict[str, str]:
        return {
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
            "WANDB_LOG_MODEL": "checkpoint",
            "WANDB_DATA_DIR": str(folder / "data"),
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_CONFIG_DIR": str(folder / "config"),
        }

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        runs: dict[str, battery.StoredRun] = {}
        for file in sorted(folder.rglob("run-*.wandb"), key=lambda path: path.stat().st_ctime_ns):
            found = parts(file)
            (record,) = found["run"][:1]
            run = runs.setdefault(
                record.run.run_id,
                battery.StoredRun(record.run.display_name, "running", {}, {}, group=record.run.run_group or None),
            )
            run.parameters.update(config_of(found))
            for line in history_of(found):
                for name, value in line.items():
                    if name not in ("train/global_step", "_step", "_runtime", "_timestamp"):
                        run.scalars.setdefault(name, []).append((line["train/global_step"], value))
            for artifact in artifacts_of(found):
                for alias in artifact.aliases:
                    run.artifacts[f"{artifact.name}:{alias}"] = [entry.path for entry in artifact.manifest.contents]
            for ended in found.get("exit", []):
                run.status = {0: "finished", 255: "killed"}.get(ended.exit.exit_code, "failed")
        return list(runs.values())


def records(file: Path) -> Iterator[Any]:
    """The records of an offline run: a LevelDB log of 32 KiB blocks, 7 bytes of header before each piece."""
    from wandb.proto import wandb_internal_pb2

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


def parts(file: Path) -> dict[str, list[Any]]:
    """The records by their kind, requests by theirs."""
    found: dict[str, list[Any]] = {}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        found.setdefault(record.request.WhichOneof("request_type") if kind == "request" else kind, []).append(record)
    return found


def history_of(found: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The log lines."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found.get("history", [])
    ]


def _items(found: dict[str, list[Any]], kind: str) -> dict[str, Any]:
    return {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in found.get(kind, [])
        for item in getattr(record, kind).update
    }


def config_of(found: dict[str, list[Any]]) -> dict[str, Any]:
    """The settings."""
    return _items(found, "config")


def summary_of(found: dict[str, list[Any]]) -> dict[str, Any]:
    """The final values."""
    return _items(found, "summary")


def artifacts_of(found: dict[str, list[Any]]) -> list[Any]:
    """What was uploaded, in its order; not what the package uploads by itself."""
    artifacts = [record.artifact for record in found.get("artifact", [])]
    artifacts += [record.request.log_artifact.artifact for record in found.get("log_artifact", [])]
    return [artifact for artifact in artifacts if artifact.type == "model"]
