"""The time of a run by phase.

Owns: `TimeBreakdown` and its two timelines. Leaves to others: what the phases are (`phases`), when a line is written.

A timeline is cut at every change of phase, so the phases add up to the whole by construction. On a CPU it is the host's
clock. On an accelerator the host runs ahead of the device, so its clock says little; there each cut is an event in the
device's queue, and the device's times are read at the log line, which waits for the device anyway: no sync is added.
"data" is then the time the device was idle: waiting that overlaps with its work does not count.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from trainwright.profiling.phases import PHASES, Function

MOST_PENDING = 4096  # events held before those that the device has passed are added up: bounds memory without log lines


class HostTimeline:
    """Seconds per phase on the host's clock."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._clock, self._phase, self._since = clock, "other", clock()

    def switch(self, phase: str) -> str:
        """Begin `phase`; returns the one before."""
        now, before = self._clock(), self._phase
        self.seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def flush(self) -> None:
        self.switch(self._phase)


class DeviceTimeline:
    """Seconds per phase on the device's clock. `new_event()` makes an event with timing, as `torch.cuda.Event`."""

    def __init__(self, new_event: Callable[[], Any]) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._new_event, self._phase = new_event, "other"
        self._passed: list[Any] = []  # events to reuse
        self._pending: collections.deque[tuple[str, Any]] = collections.deque()  # (phase that began, its event)
        self.switch("other")

    def switch(self, phase: str) -> str:
        before, self._phase = self._phase, phase
        event = self._passed.pop() if self._passed else self._new_event()
        event.record()
        self._pending.append((phase, event))
        if len(self._pending) >= MOST_PENDING:
            self._add_up()
        return before

    def flush(self) -> None:
        """Does not wait: what the device has not passed yet comes with the next call."""
        self.switch(self._phase)
        self._add_up()

    def _add_up(self) -> None:
        while len(self._pending) > 1 and self._pending[1][1].query():
            phase, start = self._pending.popleft()
            self.seconds[phase] += start.elapsed_time(self._pending[0][1]) / 1000  # milliseconds
            self._passed.append(start)


class TimeBreakdown:
    """How long each phase took, from construction on. Costs 3 Python and 2 C calls per phase of a step on a CPU."""

    def __init__(self, timeline: HostTimeline | DeviceTimeline, *, in_log_lines: bool) -> None:
        self.in_log_lines = in_log_lines
        self._timeline = timeline
        self._at_last_line = dict.fromkeys(PHASES, 0.0)

    @classmethod
    def for_run(cls, wanted: str | bool, device: torch.device) -> TimeBreakdown | None:
        """What `time_breakdown` asks for: False, "end", "logs"."""
        return cls(timeline_for(device), in_log_lines=wanted == "logs") if wanted else None

    def span(self, phase: str, function: Function) -> Function:
        switch = self._timeline.switch

        def in_phase(*args: Any, **kwargs: Any) -> Any:
            before = switch(phase)
            try:
                return function(*args, **kwargs)
            finally:
                switch(before)

        return in_phase  # type: ignore[return-value]

    def close(self) -> None:
        """No-op."""

    def line(self) -> dict[str, float]:
        """Seconds per phase since the last line, as `time_<phase>_s`; they add up to the time that passed."""
        self._timeline.flush()
        before, self._at_last_line = self._at_last_line, dict(self._timeline.seconds)
        return {f"time_{phase}_s": round(now - before[phase], 6) for phase, now in self._at_last_line.items()}

    def total(self) -> dict[str, float]:
        """Seconds per phase since the run began, as `train_time_<phase>_s`."""
        self._timeline.flush()
        return {f"train_time_{phase}_s": round(seconds, 6) for phase, seconds in self._timeline.seconds.items()}


def timeline_for(device: torch.device) -> HostTimeline | DeviceTimeline:
    """The device's own timeline where it has events that carry times (CUDA, ROCm, XPU, MPS), else the host's."""
    new_event = getattr(getattr(torch, device.type, None), "Event", None)
    if device.type == "cpu" or new_event is None:
        return HostTimeline()
    return DeviceTimeline(functools.partial(new_event, enable_timing=True))
