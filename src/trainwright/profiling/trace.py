"""`profile_steps`: a trace of some steps, to look at in a browser.

Owns: `StepProfiler`. Leaves to others: which steps (`args/reporting`), which functions of the loop are which phase
(`phases`). torch.profiler starts before the data of the first step and stops after the update of the last, so the log
lines, evaluations and saves before and after them are not in the trace.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from trainwright.profiling.phases import Function
from trainwright.safe_write import folder_inside, fresh, write_text

logger = logging.getLogger(__name__)

DIRECTORY = "profile"  # in output_dir
NUM_ROWS = 30  # of the table next to the trace


class StepProfiler:
    """Profiles the steps `first` to `last` of a run, both counted from 1 and both inside.

    current_step: returns the number of completed steps. rank: of this process; each rank writes its own trace.
    """

    def __init__(self, steps: dict[str, Any], output_dir: str, current_step: Callable[[], int], rank: int = 0) -> None:
        options = dict(steps)
        self.first, self.last = int(options.pop("first")), int(options.pop("last"))
        self._options, self._current_step, self._output_dir = options, current_step, output_dir
        self._base = os.path.join(output_dir, DIRECTORY, f"steps-{self.first}-{self.last}-rank-{rank}")
        self._profiler: Any = None
        self._is_done = False

    def span(self, phase: str, function: Function) -> Function:
        from torch.profiler import record_function

        def profiled(*args: Any, **kwargs: Any) -> Any:
            if self._profiler is None and not self._may_begin(phase):
                return function(*args, **kwargs)
            with record_function(phase):
                result = function(*args, **kwargs)
            if (
                phase == "optimizer" and self._current_step() + 1 >= self.last
            ):  # the loop counts a step after its update
                self._write()
            return result

        return profiled  # type: ignore[return-value]

    def _may_begin(self, phase: str) -> bool:
        """Start the profiler where the first of its steps begins; whether it runs now."""
        if self._is_done or phase != "data" or not self.first - 1 <= self._current_step() < self.last:
            return False
        from torch.profiler import profile

        names = {"record_shapes": "shapes", "profile_memory": "memory", "with_stack": "stacks"}
        self._profiler = profile(**{theirs: self._options.get(ours, False) for theirs, ours in names.items()})
        self._profiler.start()
        return True

    def _write(self) -> None:
        profiler, self._profiler, self._is_done = self._profiler, None, True
        profiler.stop()
        base, number = self._base, 1
        # Never overwrites the trace of an earlier attempt at these steps, before a rollback or a resume.
        while os.path.isfile(f"{base}.json") and not os.path.islink(f"{base}.json"):
            number += 1
            base = f"{self._base}-{number}"
        path = f"{base}.json"
        try:
            folder_inside(self._output_dir, DIRECTORY)
            with fresh(path) as staged:
                profiler.export_chrome_trace(staged)
            table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=NUM_ROWS)
            write_text(f"{base}.txt", table)
        except (OSError, RuntimeError) as error:  # a full disk must not end the run for the sake of a trace
            logger.warning("profile_steps: the trace could not be written to %s: %s", path, error)
        else:
            logger.info("profile_steps: the trace of steps %s to %s is in %s.", self.first, self.last, path)

    def close(self) -> None:
        """Write an unfinished trace, where the run ended early."""
        if self._profiler is not None:
            logger.warning(
                "profile_steps: the run ended after step %s, before step %s.", self._current_step(), self.last
            )
            self._write()
        elif not self._is_done:
            logger.warning(
                "profile_steps: nothing was profiled: the run ended after step %s, and the first step wanted is %s.",
                self._current_step(),
                self.first,
            )
