"""Processes that find out together, once per update, whether one of them has something to say.

Owns: `AsyncMax`, one number per process, of which each learns the largest. Leaves to others: what the number means
(`interrupt`). The numbers travel between the hosts, beside the device's own work: nothing waits for the device.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch


class AsyncMax:
    """The largest of one small number per process. `start` and `result` are called by all processes, in turns.

    Costs one reduction of four bytes on the CPU, which runs while the optimizer does: there is no cheaper way that is
    right, because processes that run apart may only stop at a step which each of them has still to reach.
    """

    def __init__(self, timeout: datetime.timedelta | None = None) -> None:
        self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        self._number = torch.zeros(1, dtype=torch.int32)
        self._view = self._number.numpy()  # the same memory, without an operator per access
        options: Any = torch.distributed.AllreduceOptions()
        options.reduceOp = torch.distributed.ReduceOp.MAX
        self._options = options
        self._under_way: Any = None

    def start(self, number: int) -> None:
        """Send this process's number; does not wait."""
        self._view[0] = number
        self._under_way = self._group.allreduce([self._number], self._options)

    def result(self) -> int:
        """The largest number that was sent. Waits for the process that is last to send."""
        self._under_way.wait()
        return int(self._view[0])

    def close(self) -> None:
        """Let go of the connections. No process may be waiting for a result."""
        torch.distributed.destroy_process_group(self._group)
