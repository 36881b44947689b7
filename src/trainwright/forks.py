"""Resources that a forked process must not inherit: a loader worker, a pool of a callback, a user's `os.fork`.

Owns: notifying objects in a fork. Leaves to others: what each releases.

Why: a fork has a copy of each file descriptor. While it lives, the other end of a pipe gets no end of file, a lock is
held, and memory of a descriptor is not freed. And a fork that leaves `train()` by an exception runs every `finally` of
the run, where it must not close what belongs to the run.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class HeldAlone(Protocol):
    """A resource of the process that made it."""

    def let_go(self) -> None:
        """Called in a fork: close its copies of descriptors, without messages to other processes."""
        ...


_held: weakref.WeakSet[HeldAlone] = weakref.WeakSet()


def hold_alone(item: HeldAlone) -> None:
    """While `item` lives, each fork of this process calls its `let_go`."""
    _held.add(item)


def _in_fork() -> None:
    for item in list(_held):
        item.let_go()
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_in_fork)
