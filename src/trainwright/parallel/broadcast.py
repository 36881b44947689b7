"""One search run by several processes: process 0 asks the engine, the others train the same trials with it.

Owns: `share` and the two messages of a search ("here is a trial", "it is over"). Leaves to others: the engines, and
starting the processes. Every function here is a collective: all processes must call it in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def world() -> tuple[int, int]:
    """(rank of this process, number of processes); (0, 1) where no process group exists."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(value: Any = None) -> Any:
    """The `value` of process 0, in every process; what the others pass is not looked at."""
    if world()[1] == 1:
        return value
    import torch.distributed as dist

    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def finish(result: Any) -> Any:
    """Called by process 0 when the search is over: releases the others, which return the same `result`."""
    share(("over", result))
    return result


def announce(trial: Any) -> None:
    """Called by process 0 before each trial: the others begin the same one."""
    share(("trial", trial))


def follow(run_trial: Callable[[Any], None]) -> Any:
    """Called by every other process: run each announced trial until process 0 finishes; return its result, or raise it
    where it is the error that process 0 failed with.
    """
    while True:
        kind, payload = share()
        if kind == "over" and isinstance(payload, Exception):
            raise payload
        if kind == "over":
            return payload
        run_trial(payload)
