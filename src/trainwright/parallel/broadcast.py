"""Broadcasting objects from rank 0, and the trials of a hyper-parameter search that all ranks train together.

Owns: `share` and the two messages of a search ("trial", "over"). Leaves to others: the engines, and starting the
processes. Every function here is a collective: all ranks must call it in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(value: Any = None) -> Any:
    """The `value` of rank 0, on every rank; those of the others are ignored."""
    if world()[1] == 1:
        return value
    import torch.distributed as dist

    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def finish(result: Any) -> Any:
    """Called by rank 0 when the search is over: releases the others, which return the same `result`."""
    share(("over", result))
    return result


def announce(trial: Any) -> None:
    """Called by rank 0 before each trial: the others begin the same one."""
    share(("trial", trial))


def follow(run_trial: Callable[[Any], None]) -> Any:
    """Called by every other rank: run each announced trial until rank 0 finishes; return its result, or raise its
    error.
    """
    while True:
        kind, payload = share()
        if kind == "over" and isinstance(payload, Exception):
            raise payload
        if kind == "over":
            return payload
        run_trial(payload)
