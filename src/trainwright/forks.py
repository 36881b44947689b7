"""What must not pass to a process that this one forks: a worker of a loader, a pool of a callback, a user's `os.fork`.

Owns: telling objects that they are in a fork now. Leaves to others: what each lets go of.

Why: a fork has a copy of each file descriptor. For as long as it lives, the other end of a pipe sees no end of file, a
lock is held, and memory that a descriptor names is not freed. And a fork that leaves `train()` by an exception passes
through every `finally` of the run, where it must end nothing that belongs to the run.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class HeldAlone(Protocol):
    """Something that belongs to the process that made it."""

    def let_go(self) -> None:
        """Called in a fork: close its copies of descriptors, without a word to other processes."""
        ...


_held: weakref.WeakSet[HeldAlone] = weakref.WeakSet()


def hold_alone(item: HeldAlone) -> None:
    """From now on, while `item` lives, each fork of this process calls its `let_go`."""
    _held.add(item)


def _in_fork() -> None:
    for item in list(_held):
        item.let_go()
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_in_fork)
