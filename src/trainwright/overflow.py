"""`debug="underflow_overflow"`: which module gave the first NaN or infinity, and what led there.

Owns: `OverflowWatch`. Leaves to others: switching it on for a run (Trainer). Reads from the device after every module,
which makes training several times slower: for debugging only. Source: seed 001 (`debug`).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

NUM_FRAMES = 21  # modules that the report goes back


class OverflowFound(ValueError):
    """A module's output held NaN or infinity; the message lists it and the modules that ran before it."""


class OverflowWatch:
    """Looks at the output of every module of `model` until it is closed. Raises OverflowFound."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name or type(model).__name__ for name, module in model.named_modules()}
        self._frames: collections.deque[str] = collections.deque(maxlen=NUM_FRAMES)
        self._handles = [module.register_forward_hook(self._look) for module in self._names]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, module: nn.Module, inputs: Any, output: Any) -> None:
        largest = [float(tensor.detach().abs().max()) for tensor in _floats(output)]
        shown = ", ".join(f"{value:.2e}" for value in largest) or "no floating-point output"
        self._frames.append(f"{self._names[module]} ({type(module).__name__}): largest output {shown}")
        if not all(map(math.isfinite, largest)):
            frames = "\n  ".join(self._frames)
            raise OverflowFound(
                f"The output of {self._names[module]} is not finite. The modules that ran last, oldest "
                f"first:\n  {frames}"
            )


def _floats(value: Any) -> list[torch.Tensor]:
    """The non-empty floating-point tensors in an output, however nested."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _floats(part)]
