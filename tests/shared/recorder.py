"""A tracker without a package, which remembers what it is told."""

from __future__ import annotations

from trainwright.tracking.base import TrackerCallback


class Recorder(TrackerCallback):
    """A tracker that keeps what it is told; it fails where `fails_in` says."""

    tracker_name = "kubeflow"  # needs no package
    fails_in = ""
    opens_run = True
    id = None

    def __init__(self) -> None:
        super().__init__()
        self.told: list = []

    def _tell(self, what, value=None):
        self.told.append((what, value))
        if self.fails_in == what:
            raise ConnectionError("server unreachable")

    def setup(self, args, state, model, **kwargs):
        self._owns_run = self.opens_run
        self._tell("setup", self._resume_id)

    def run_id(self):
        return self.id

    def log_metrics(self, metrics, state):
        self._tell("log", (state.global_step, metrics))

    def log_checkpoint(self, directory, args, state):
        self._tell("checkpoint", str(directory))

    def finish(self, args, state, model, **kwargs):
        self._tell("finish")

    def end(self, status):
        self._tell("end", status)
