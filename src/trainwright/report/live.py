"""The page of a run, current while it lasts.

Owns: when it is written. Leaves to others: what is on it (`html`), where its values come from (`run_history`).
"""

from __future__ import annotations

import glob
import logging
import os
import time
from contextlib import suppress

from trainwright.names import METRICS_NAME, REPORT_NAME

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0  # at least, between two pages
LARGEST_SHARE = 0.01  # of the time of a run that its pages may take


class LiveReport:
    """Writes `training_report.html` from `metrics.jsonl`: at a log line, if the last page is old, and at the end.

    On the first process. A page costs some milliseconds of its CPU, more where the history is long, so the interval
    grows with what the last one cost; between two pages a log line costs a look at the clock. No device is read. It
    never ends a run: what fails is one warning.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.num_pages = 0
        self._directory = os.fspath(directory)
        self._due = time.monotonic() + INTERVAL_S  # a run that is over at once has one page, at its end
        self._has_warned = False

    def added(self) -> None:
        """A log line was added to the file."""
        if time.monotonic() >= self._due:
            self._write(is_running=True)

    def closed(self) -> None:
        """The run is over, or something was logged after it."""
        self._write(is_running=False)

    def _write(self, *, is_running: bool) -> None:
        start = time.monotonic()
        try:
            if not self.num_pages:
                self._remove_unfinished()
            if os.path.lexists(os.path.join(self._directory, METRICS_NAME)):  # it may have been deleted, with the run
                from trainwright.report.html import write_run_report

                write_run_report(self._directory, is_running=is_running)
                self.num_pages += 1
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%s is not current; the run continues (said once): %s: %s. Write it with `trainwright report`.",
                    os.path.join(self._directory, REPORT_NAME),
                    type(error).__name__,
                    error,
                )
        end = time.monotonic()
        self._due = end + max(INTERVAL_S, (end - start) / LARGEST_SHARE)

    def _remove_unfinished(self) -> None:
        """What a process left that was killed while it wrote a page."""
        for path in glob.glob(os.path.join(glob.escape(self._directory), f".{REPORT_NAME}.*.tmp")):
            with suppress(OSError):
                os.unlink(path)
