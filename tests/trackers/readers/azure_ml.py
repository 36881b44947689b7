"""Azure Machine Learning: outside of it a run is an offline run, which prints what it would send."""

from __future__ import annotations

import re
from pathlib import Path

import battery

_NOT_THERE = "an offline run prints scalars only"


class Reader(battery.Reader):
    name = "azure_ml"
    distribution = "azureml-core"
    lacks = {
        "steps": "an offline run has no room for them",
        "runs": "a script is one run, submitted by the service",
        "status": "the service has it, from the exit code of the script",
        "resume": "the service resumes no run",
        "later lines": "they cannot be told from those of the training, in what is printed",
        **dict.fromkeys(("parameters", "artifacts", "names", "group"), _NOT_THERE),
    }

    def environment(self, folder: Path) -> dict[str, str]:
        printed = folder / "output-0"  # of the process before, which the next would overwrite
        if printed.exists():
            printed.rename(folder / f"printed-{len(list(folder.glob('printed-*')))}")
        return {}

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        files = sorted(folder.glob("printed-*"))
        return [battery.StoredRun(None, None, _scalars(file.read_text()), {}) for file in files]

    def scalar(self, name: str) -> str:
        return name


def _scalars(printed: str) -> dict[str, list[tuple[int | None, float]]]:
    """Of the first training of a program, which ends with a flush."""
    scalars: dict[str, list[tuple[int | None, float]]] = {}
    for name, value in re.findall(r"log scalar metric (.*):\n(.*)\n", printed.partition("Attempted to flush")[0]):
        scalars.setdefault(name, []).append(
            (None, float(value == "True") if value in ("True", "False") else float(value))
        )
    return scalars
