"""SwanLab: the records of offline runs, through its own `DataStoreReader`. Those with one id are one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import battery


class Reader(battery.Reader):
    name = "swanlab"
    distribution = "swanlab"
    lacks = {
        "artifacts": "no variable of the integration asks for files",
        "resume": "the package writes in blocks: most of what an offline process has that crashes is lost",
    }

    def environment(self, folder: Path) -> dict[str, str]:
        return {"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": str(folder / "swanlog"), "SWANLAB_PROJECT": "battery"}

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        import yaml
        from swanlab.proto.swanlab.run.v1.run_pb2 import RunState

        runs: dict[str, battery.StoredRun] = {}
        for file in files(folder):
            found = records(file)
            start = found[0].start
            run = runs.setdefault(start.id, battery.StoredRun(start.name, "running", {}, {}, group=start.group or None))
            for record in found:
                kind = record.WhichOneof("record_type")
                if kind == "scalar":
                    scalar = record.scalar
                    points = run.scalars.setdefault(scalar.key, [])
                    if scalar.step not in dict(points):  # as `swanlab sync` does
                        points.append((scalar.step, scalar.value.number))
                elif kind == "finish":
                    state = RunState.Name(record.finish.state).rpartition("_")[2]
                    run.status = {"FINISHED": "finished", "CRASHED": "failed", "ABORTED": "killed"}.get(state, state)
            config = file.parent / "files" / "config.yaml"
            run.parameters.update({name: item["value"] for name, item in yaml.safe_load(config.read_text()).items()})
        return list(runs.values())


def files(folder: Path) -> list[Path]:
    """Of the runs, oldest first; not those of processes that crashed before anything was written."""
    found = sorted((folder / "swanlog").glob("run-*/*.swanlab"), key=lambda path: path.parent.name)
    return [path for path in found if path.stat().st_size]


def records(file: Path) -> list[Any]:
    """What is stored, in its order; first how the run was started."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    reader = DataStoreReader()
    reader.open(str(file))
    return sorted(
        (Record.FromString(data) for data in reader), key=lambda record: record.WhichOneof("record_type") != "start"
    )
