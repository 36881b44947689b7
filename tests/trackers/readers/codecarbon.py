"""CodeCarbon: the lines of `emissions.csv` in the directories of the checkpoints, one for each training."""

from __future__ import annotations

import csv
from pathlib import Path

import battery


class Reader(battery.Reader):
    name = "codecarbon"
    distribution = "codecarbon"
    lacks = {
        "scalars": "it measures energy, and receives no log lines",
        "steps": "it measures a training as a whole",
        "status": "a line of emissions.csv has none",
        "parameters": "it receives none",
        "artifacts": "it receives none",
        "names": "a line of emissions.csv has none",
        "group": "a line of emissions.csv has none",
        "resume": "each process is measured by itself",
        "later lines": "it measures trainings only",
    }

    def environment(self, folder: Path) -> dict[str, str]:
        return {
            "CODECARBON_COUNTRY_ISO_CODE": "FRA",
            "CODECARBON_ALLOW_MULTIPLE_RUNS": "True",
            "CODECARBON_LOG_LEVEL": "error",
        }

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        lines = []
        for file in sorted(folder.rglob("emissions.csv"), key=lambda path: path.stat().st_mtime_ns):
            with open(file) as table:
                lines += list(csv.DictReader(table))
        assert all(float(line["duration"]) > 0 and line["country_iso_code"] == "FRA" for line in lines)
        lines.sort(key=lambda line: line["timestamp"])
        return [battery.StoredRun(None, None, {}, {}) for _ in lines]
