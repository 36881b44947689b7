"""The parts of a training loop, and wrapping them so that something can watch.

Owns: the names of the parts and `Watchers`. Leaves to others: what a watcher does at a part's begin and end
(`breakdown`, `speed`, `profile`). Without a watcher the loop calls its own functions, unwrapped: it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

# In the order of a step. Time in none of them is "other". A part inside another one interrupts it.
PARTS = (
    "data",  # waiting for the next micro-batches, and going to a position in the data
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


class Watcher(Protocol):
    """Something that is told when parts begin and end, by wrapping the functions that are parts."""

    def watch(self, part: str, function: Function) -> Function:
        """`function`, watched as `part`; `function` itself where this watcher does not look at that part."""

    def close(self) -> None:
        """The run is over, well or not."""


class Watchers:
    """All that watch one run."""

    def __init__(self, watchers: Iterable[Watcher | None] = ()) -> None:
        self._all = [watcher for watcher in watchers if watcher is not None]

    def watch(self, part: str, function: Function) -> Function:
        for watcher in self._all:
            function = watcher.watch(part, function)
        return function

    def close(self) -> None:
        for watcher in self._all:
            watcher.close()
        self._all = []
