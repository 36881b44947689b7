"""`debug="underflow_overflow"`: the module whose output had the first NaN or infinity, and the magnitudes before it.

Owns: `OverflowDetector`. Leaves to others: switching it on for a run (Trainer). Reads from the device after every
module, which makes training several times slower: for debugging only. It checks forward passes; NaN that first appears
in a gradient is found by the argument `nonfinite`. Source: seed 001 (`debug`).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

NUM_FRAMES = 21  # modules that the report goes back
HEADING = "smallest   largest   (magnitudes; a smallest near 0 underflows, a largest near 65504 overflows in float16)"


class OverflowFound(ValueError):
    """A module's output held NaN or infinity; the message shows it and the modules that ran before it."""


class OverflowDetector:
    """Checks weights, inputs and outputs of every module of `model` until it is closed. Raises OverflowFound."""

    def __init__(self, model: nn.Module) -> None:
        self._root, self._num_passes = model, 1
        self._names = {module: name or type(model).__name__ for name, module in model.named_modules()}
        self._frames: collections.deque[str] = collections.deque(maxlen=NUM_FRAMES)
        self._handles = [module.register_forward_hook(self._check, with_kwargs=True) for module in self._names]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _check(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        weights = _magnitudes("", dict(module.named_parameters(recurse=False)))
        given = _magnitudes("input", {**dict(enumerate(args)), **kwargs})
        gave = _magnitudes("output", output)
        rows = [f"  {low:8.2e}  {high:8.2e}  {what}" for what, low, high in (*weights, *given, *gave)]
        self._frames.append("\n".join([f"{self._names[module]} ({type(module).__name__})", *rows]))
        if _all_finite(gave):
            self._num_passes += module is self._root
            return
        name = self._names[module]
        cause = "Its weights and inputs are finite: it overflowed here."
        if not _all_finite(weights):
            cause = "Its weights are not finite."
        elif not _all_finite(given):
            cause = "Neither was its input: it came from the data, or from what runs between the modules."
        frames = "\n".join(self._frames)
        raise OverflowFound(
            f"The output of {name} is not finite, in forward pass {self._num_passes} of this run. {cause} The modules "
            f"that ran last, oldest first:\n  {HEADING}\n{frames}"
        )


def _magnitudes(name: str, value: Any) -> list[tuple[str, float, float]]:
    """(what, smallest, largest magnitude) of the non-empty floating-point tensors in a value, however nested."""
    if isinstance(value, torch.Tensor):
        if not (value.is_floating_point() and value.numel()):
            return []
        value = value.detach()
        low, high = (value.float() if value.element_size() == 1 else value).abs().aminmax()  # float8 has no abs
        return [(name, float(low), float(high))]
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    return [row for key, part in parts for row in _magnitudes(f"{name}[{key}]" if name else str(key), part)]


def _all_finite(rows: list[tuple[str, float, float]]) -> bool:
    return all(math.isfinite(low) and math.isfinite(high) for _, low, high in rows)
