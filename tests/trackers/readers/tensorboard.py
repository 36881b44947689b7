"""TensorBoard: event files, through its `EventAccumulator`. A run is a directory."""

from __future__ import annotations

import json
from pathlib import Path

import battery


class Reader(battery.Reader):
    name = "tensorboard"
    distribution = "tensorboard"
    imported_once = ("tensorboard",)
    lacks = {"status": "event files have none", "artifacts": "event files hold none"}

    def environment(self, folder: Path) -> dict[str, str]:
        return {}

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        files = sorted(folder.rglob("events.*"), key=lambda path: path.stat().st_mtime_ns)
        runs = []
        for directory in dict.fromkeys(file.parent for file in files):
            events = EventAccumulator(str(directory), {"scalars": 0, "tensors": 0})
            events.Reload()
            scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
            parameters = {}
            for tag in events.Tags()["tensors"]:
                (text,) = events.Tensors(tag)[-1].tensor_proto.string_val
                parameters.update(json.loads(text))
            inside = directory.relative_to(folder).parts
            group = inside[-2] if len(inside) > 3 else None  # below that of the search
            runs.append(battery.StoredRun("/".join(inside), None, scalars, parameters, group=group))
        return runs
