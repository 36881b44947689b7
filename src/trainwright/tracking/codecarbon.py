"""CodeCarbon: the energy a training takes.

Owns: `CodeCarbonCallback`. Leaves to others: CODECARBON_* variables and `.codecarbon.config`, which the package reads
itself. Without CODECARBON_COUNTRY_ISO_CODE it looks up the place over the network, and works, slowly, without one.
Source: seed 000.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments


class CodeCarbonCallback(TrackerCallback):
    """Measure from the start to the end of training; `emissions.csv` goes to `output_dir`. Log lines are not sent."""

    tracker_name = "codecarbon"
    stays_open = False

    def __init__(self) -> None:
        super().__init__()
        self.tracker: Any = None

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import codecarbon

        offline = "CODECARBON_COUNTRY_ISO_CODE" in os.environ
        tracker_class = codecarbon.OfflineEmissionsTracker if offline else codecarbon.EmissionsTracker
        os.makedirs(str(args.output_dir), exist_ok=True)
        self.tracker = tracker_class(output_dir=args.output_dir)
        self._owns_run = True
        self.tracker.start()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """No-op: a log line outside of training must not start a measurement."""

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        """No-op, as `on_log`."""

    def end(self, status: Status) -> None:
        tracker, self.tracker = self.tracker, None
        tracker.stop()
