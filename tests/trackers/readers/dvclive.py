"""DVCLive: its directory of text files. `test_dvclive.py` has what it does in a repository."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import battery


class Reader(battery.Reader):
    name = "dvclive"
    distribution = "dvclive"
    lacks = {
        "status": "its files have none",
        "names": "a run is a directory, or an experiment of DVC in a Git repository, which is not here",
        "artifacts": "DVC keeps them, in a repository",
    }

    def environment(self, folder: Path) -> dict[str, str]:
        return {"DVC_NO_ANALYTICS": "true", "DVC_STUDIO_OFFLINE": "true"}

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        files = sorted(folder.rglob("params.yaml"), key=lambda path: path.stat().st_ctime_ns)
        return [stored_in(file.parent, folder) for file in files]

    def scalar(self, name: str) -> str:
        return name.replace("eval_", "eval/").replace("train_", "train/")


def stored_in(directory: Path, folder: Path) -> battery.StoredRun:
    """One run."""
    from dvclive.serialize import load_yaml

    scalars: dict[str, list[tuple[int | None, float]]] = {}
    root = directory / "plots" / "metrics"
    for file in root.rglob("*.tsv"):
        with open(file) as lines:
            rows = list(csv.DictReader(lines, delimiter="\t"))
        name = str(file.relative_to(root))[: -len(".tsv")]
        scalars[name] = [(int(row["step"]), _number(row[name.rpartition("/")[2]])) for row in rows]
    inside = directory.relative_to(folder).parts
    group = "/".join(inside[:-1]) or None
    return battery.StoredRun("/".join(inside), None, scalars, load_yaml(directory / "params.yaml"), group=group)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def summary_of(directory: Path) -> dict[str, object]:
    """The last value of each scalar."""
    summary: dict[str, object] = json.loads((directory / "metrics.json").read_text())
    return summary
