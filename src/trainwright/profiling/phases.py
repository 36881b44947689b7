"""The phases of a training loop, and wrapping their functions for profilers.

Owns: the names of the phases and `Profilers`. Leaves to others: what a profiler does at a phase's begin and end
(`breakdown`, `speed`, `trace`), which a run has (`profilers`). Without a profiler the loop's functions are not wrapped:
it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from trainwright.profiling.breakdown import TimeBreakdown
    from trainwright.profiling.speed import SpeedMeter

# In the order of a step. Time in none of them is "other". A phase inside another one interrupts it.
PHASES = (
    "data",  # waiting for the next micro-batches, and seeking to a position in the data
    "forward",  # moving inputs to the device, the model, the loss
    "backward",
    "optimizer",  # clipping, the check for NaN, the update, the schedule, clearing gradients
    "evaluation",
    "saving",
    "logging",  # the read from the device at a log line, and writing the line
    "callbacks",  # all of them: progress bars, trackers, the user's own
    "other",
)

Function = TypeVar("Function", bound=Callable[..., Any])


class Profiler(Protocol):
    """Observes phases by wrapping their functions."""

    def span(self, phase: str, function: Function) -> Function:
        """`function` wrapped as `phase`; `function` itself where this profiler does not profile that phase."""

    def close(self) -> None:
        """Called at the end of the run, also after an exception."""


class Profilers:
    """The profilers of one run, each None where it is off, and what they add to its log lines."""

    def __init__(
        self, breakdown: TimeBreakdown | None = None, speed: SpeedMeter | None = None, profiler: Profiler | None = None
    ) -> None:
        self.breakdown, self.speed = breakdown, speed
        # The last one is outermost: starting and writing a trace is "other", not part of the loop.
        self._all: list[Profiler] = [profiler for profiler in (breakdown, speed, profiler) if profiler is not None]
        self._wrapped: list[tuple[Any, str]] = []

    def span(self, phase: str, function: Function) -> Function:
        for profiler in self._all:
            function = profiler.span(phase, function)
        return function

    def span_method(self, owner: Any, name: str, phase: str) -> None:
        """Wrap a method of `owner`, until these profilers are closed."""
        if self._all:
            setattr(owner, name, self.span(phase, getattr(owner, name)))
            self._wrapped.append((owner, name))

    def line(self, step: int, num_tokens: int) -> dict[str, Any]:
        """Values for a log line of the training loss."""
        values: dict[str, Any] = {}
        if self.speed is not None:
            values.update(self.speed.line(step, num_tokens))
        if self.breakdown is not None and self.breakdown.in_log_lines:
            values.update(self.breakdown.line())
        return values

    def total(self, step: int, num_tokens: int) -> dict[str, Any]:
        """Values for the final metrics of the run."""
        values: dict[str, Any] = {}
        if self.breakdown is not None:
            values.update(self.breakdown.total())
        if self.speed is not None:
            values.update(self.speed.total(step, num_tokens))
        return values

    def close(self) -> None:
        for owner, name in self._wrapped:
            vars(owner).pop(name, None)
        for profiler in self._all:
            profiler.close()
        self._all, self._wrapped = [], []
