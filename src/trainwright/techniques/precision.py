"""Temporary changes of precision: float32 products in TF32, weights in half precision.

Owns: setting both and restoring them, bit by bit. Leaves to others: mixed precision (torch.autocast, Trainer), whether
the device supports them (`args/device.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def float32_products(tf32: bool | None) -> Iterator[None]:
    """Within the block, float32 matrix products and convolutions use TF32 (True), or full precision (False).

    None keeps torch's setting. The setting is global to the process, so it is restored after the block.
    """
    if tf32 is None:
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def half_weights(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block, the floating-point weights and buffers of `model` are `dtype`; after it, they are restored.

    The device holds only the half-precision copy: the originals are in the host's memory. Parameters stay the same
    objects, so an optimizer that holds them keeps working. None is a no-op.
    """
    if dtype is None:
        yield
        return
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.dtype != dtype]
    originals = [(tensor, tensor.device, tensor.data.cpu()) for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor, device, original in originals:
            tensor.data = original.to(device)


def with_floats_as(inputs: Any, dtype: torch.dtype | None, but: Sequence[str]) -> Any:
    """A batch whose floating-point tensors are `dtype`, as half-precision weights need, except those named in `but`."""
    if dtype is None or not isinstance(inputs, Mapping):
        return inputs
    inputs = inputs if isinstance(inputs, dict) else dict(inputs)
    for name, value in inputs.items():
        if name not in but and isinstance(value, torch.Tensor) and value.is_floating_point():
            inputs[name] = value.to(dtype)
    return inputs
