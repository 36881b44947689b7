"""The running loss between two log lines.

Owns: micro-batch losses, kept on their device until a log line reads them all at once. Leaves to others: when to read,
and averaging over processes. Cost per micro-batch: one list append, no tensor operation, no host sync.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

_FOLD_AT = (
    1024  # losses kept as separate scalars before they are folded into one tensor: bounds memory between log lines
)


class LossWindow:
    """Losses since the last log line, and what came before.

    Each micro-batch adds its share of the update's loss (already divided by the accumulation count, or by the number of
    items in the whole update), so the sum over an update is that update's loss and `mean = sum / updates`.

    `filter_nonfinite`: the documented `logging_nan_inf_filter`. A NaN or infinite loss counts as the mean of the finite
    ones before it in the window, so one bad micro-batch does not hide the others. Training itself is not changed by it.
    `num_kept`: the newest losses that `pending` always holds one by one, those of the update under way.
    """

    def __init__(self, filter_nonfinite: bool = True, num_kept: int = 1) -> None:
        self.filter_nonfinite = filter_nonfinite
        self._fold_from = _FOLD_AT + num_kept
        self.pending: list[torch.Tensor] = []  # scalars on the device, oldest first
        self._folded: list[torch.Tensor] = []  # each (_FOLD_AT,)
        self._carried: tuple[float, int] = (0.0, 0)  # sum and count restored from a checkpoint
        self._shared: torch.Tensor | None = None  # see as_tensor
        self.num_without = 0  # updates of the window that had no loss, as they had no label

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of one micro-batch, of shape (), on any device; its graph is freed."""
        self.pending.append(loss.detach() if loss.requires_grad else loss)
        if len(self.pending) >= self._fold_from:
            self._folded.append(torch.stack(self.pending[:_FOLD_AT]))
            self.pending = self.pending[_FOLD_AT:]

    def __len__(self) -> int:
        return self._carried[1] + len(self.pending) + _FOLD_AT * len(self._folded)

    def take(
        self, *extra: torch.Tensor | float, mean: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[float, list[float]]:
        """Return the sum of the window's losses and the values of `extra`, and start a new window.

        All of it crosses from the device in one read. Extra values that are plain numbers are passed through.
        `mean`: averages a vector over the processes, on the device, before it is read; all call this together.
        """
        total, values = self._read(extra) if mean is None else self._read_means(extra, mean)
        self.pending, self._folded, self._carried, self._shared = [], [], (0.0, 0), None
        self.num_without = 0
        return total, values

    def as_tensor(self, device: torch.device) -> torch.Tensor:
        """The window's sum as a scalar tensor that the caller may reset in place (`tr_loss -= tr_loss`).

        For overrides of `_maybe_log_save_evaluate` written for the documented interface; costs a few tensor operations.
        """
        if self._shared is None:
            self._shared = torch.tensor(self._carried[0], device=device)
            self._carried = (0.0, 0)
        for chunk in (*self._folded, *self.pending):
            self._shared += chunk.sum()
        self.pending, self._folded = [], []
        return self._shared

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs so that the first log line after a resume is the same. Reads from the device."""
        return {"sum": self._read(())[0], "num_losses": len(self), "num_without": self.num_without}

    def load_state(self, state: dict[str, Any]) -> None:
        self.pending, self._folded = [], []
        self._carried = (float(state["sum"]), int(state["num_losses"]))
        self.num_without = int(state.get("num_without", 0))

    def _read_means(
        self, extra: tuple[torch.Tensor | float, ...], mean: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[float, list[float]]:
        parts = [*self._folded, *self.pending, *([] if self._shared is None else [self._shared])]
        tensors = [*parts, *(value for value in extra if isinstance(value, torch.Tensor))]
        device = tensors[0].device if tensors else torch.device("cpu")
        numbers = [
            torch.as_tensor(value, dtype=torch.float64).detach().to(device, non_blocking=True).reshape(1)
            for value in (self._carried[0], *extra)
        ]
        if parts:
            # Exact, so that the order does not matter, unless a loss is 2**29 times smaller than their sum.
            numbers[0] = numbers[0] + torch.cat([part.reshape(-1) for part in parts]).sum(dtype=torch.float64)
        total, *values = mean(torch.cat(numbers)).tolist()
        if self.filter_nonfinite and not math.isfinite(total):  # in every process alike, so all come here
            (total,) = mean(torch.tensor([self._read(())[0]], dtype=torch.float64)).tolist()
        return total, values

    def _read(self, extra: tuple[torch.Tensor | float, ...]) -> tuple[float, list[float]]:
        tensors = [value.detach().reshape(1) for value in extra if isinstance(value, torch.Tensor)]
        losses = [*self._folded, *([torch.stack(self.pending)] if self.pending else [])]
        if self._shared is not None:
            losses.insert(0, self._shared.reshape(1))
        chunks = losses + tensors
        if chunks:
            device = chunks[0].device
            # Doubles hold every float32 loss and every token count below 2**53; MPS has no doubles.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            numbers: list[float] = torch.cat([chunk.to(device, dtype) for chunk in chunks]).tolist()
        else:
            numbers = []
        num_losses = len(numbers) - len(tensors)
        read = iter(numbers[num_losses:])
        values = [next(read) if isinstance(value, torch.Tensor) else float(value) for value in extra]
        return self._sum(numbers[:num_losses]), values

    def _sum(self, losses: list[float]) -> float:
        carried, count = self._carried
        total = carried
        # One by one, not sum(): from Python 3.12 on that rounds differently than adding in two parts does.
        for loss in losses:
            total += loss
        if math.isfinite(total) or not self.filter_nonfinite:
            return total
        total = carried
        for loss in losses:
            total += loss if math.isfinite(loss) else (total / count if count else 0.0)
            count += 1
        return total
