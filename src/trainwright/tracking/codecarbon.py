"""CodeCarbon: the energy a training takes.

Owns: `CodeCarbonCallback`. Leaves to others: all other CODECARBON_* variables and `.codecarbon.config`, which the
package reads itself. Without CODECARBON_COUNTRY_ISO_CODE it looks up the place over the network, and works, slowly,
without one. Source: seed 000.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from trainwright.interrupt import same_handlers
from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments


class CodeCarbonCallback(TrackerCallback):
    """Measure from the start to the end of training, in whichever way it ends. Log lines are not sent.

    Environment:
        CODECARBON_OUTPUT_DIR: where `emissions.csv` goes; `output_dir` by default.
        CODECARBON_COUNTRY_ISO_CODE: the country, "FRA" for example; nothing is looked up over the network then.
    """

    tracker_name = "codecarbon"
    stays_open = False

    def __init__(self) -> None:
        super().__init__()
        self.tracker: Any = None
        self._takes_sigterm = False

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import codecarbon

        offline = "CODECARBON_COUNTRY_ISO_CODE" in os.environ
        tracker_class = codecarbon.OfflineEmissionsTracker if offline else codecarbon.EmissionsTracker
        directory = os.environ.get("CODECARBON_OUTPUT_DIR") or str(args.output_dir)
        os.makedirs(directory, exist_ok=True)
        # With allow_multiple_runs=False it takes SIGINT and SIGTERM, and never returns them.
        with same_handlers():
            self.tracker = tracker_class(output_dir=directory)
            of_package = signal.getsignal(signal.SIGTERM)
        # A signal that ends the process at once would leave its lock file, after which nothing is measured any more.
        self._takes_sigterm = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and callable(of_package)
        if self._takes_sigterm:
            signal.signal(signal.SIGTERM, of_package)
        self._owns_run = True
        self.tracker.start()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """No-op: a log line outside of training must not start a measurement."""

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        """No-op, as `on_log`."""

    def training_ended(self, status: Status) -> None:
        super().training_ended(status)
        if self._takes_sigterm:
            self._takes_sigterm = False
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end(self, status: Status) -> None:
        tracker, self.tracker = self.tracker, None
        tracker.stop()
