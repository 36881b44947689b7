"""An asynchronous MAX all-reduce of one small number per rank.

Owns: `AsyncMax`. Leaves to others: what the number means (checkpoint/asynchronous.py). It runs between the hosts (gloo)
while the devices compute: nothing waits for a device.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch


class AsyncMax:
    """The maximum of one small number per rank. All ranks call `start` and `result` in the same order.

    Costs one reduction of four bytes on the CPU, which overlaps with what the ranks do between the two calls.
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
        """Start the reduction with this rank's number; does not wait."""
        self._view[0] = number
        self._under_way = self._group.allreduce([self._number], self._options)

    def result(self) -> int:
        """The maximum over all ranks, which it waits for; 0 where nothing was started since the last result."""
        work, self._under_way = self._under_way, None
        if work is None:
            return 0
        work.wait()
        return int(self._view[0])

    def close(self) -> None:
        """Destroy the process group. No rank may be waiting for a result."""
        torch.distributed.destroy_process_group(self._group)
