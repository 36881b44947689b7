"""What a resumed training needs to know of a tracker's run: which it is, and what of it arrived.

Owns: `tracker_runs/<tracker>.json` in the directory of the checkpoints, written with each log line, because a crash
between two checkpoints leaves points in the tracker that the resumed training logs again. Leaves to others: continuing
the run (each tracker), leaving out what it has (`base`), which training it is (`state.run`, a name that is in its
checkpoints, too).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trainwright.safe_write import earlier_bytes, folder_inside, write_text

FOLDER = "tracker_runs"


@dataclass
class TrackedRun:
    """The run of one tracker."""

    directory: str  # of the checkpoints of the training
    tracker: str
    training: str | None  # which it is, as its checkpoints say; None: no training, or one that cannot be resumed
    id: str | None  # as `TrackerCallback.run_id` gives it; None: the run cannot be continued
    last_steps: dict[str, int] = field(default_factory=dict)  # name in the tracker -> step of its last value
    _folder: str | None = field(default=None, init=False)  # once it was made

    def sent(self, names: Iterable[str], step: int) -> None:
        """The tracker has values for `names` at `step`."""
        self.last_steps.update(dict.fromkeys(names, step))
        if self.id is None or self.training is None:
            return
        if self._folder is None and os.path.isdir(self.directory):  # else there is nothing to resume from
            self._folder = folder_inside(self.directory, FOLDER)
        if self._folder is not None:
            content = {"training": self.training, "id": self.id, "last_steps": self.last_steps}
            write_text(_path(self._folder, self.tracker), json.dumps(content))


def read(directory: str, tracker: str, training: str | None) -> TrackedRun | None:
    """The run that `tracker` had for `training`, which saves into `directory`; None: none, or none that can be read."""
    try:
        saved: Any = json.loads(earlier_bytes(_path(os.path.join(directory, FOLDER), tracker)))
        if training is None or saved["training"] != training or not isinstance(saved["id"], str):
            return None
        last_steps = {str(name): int(step) for name, step in saved["last_steps"].items()}
        return TrackedRun(directory, tracker, training, saved["id"], last_steps)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _path(folder: str, tracker: str) -> str:
    return os.path.join(folder, f"{tracker}.json")
