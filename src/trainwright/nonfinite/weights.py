"""Weights that are not finite are not saved: nothing could be resumed from them.

Owns: which tensors of a model are checked, checking them, and refusing. Leaves to others: when to save
(`checkpoint/saves`), updates (`guard`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterator, Sequence

import torch
from torch import nn

from trainwright.interop.loaded import is_peft_model
from trainwright.names import some
from trainwright.nested import strided_parts
from trainwright.nonfinite.updates import MAX_NAMED, NonFiniteError
from trainwright.shards import local_part

logger = logging.getLogger(__name__)


def checkable_tensors(model: nn.Module, exempt: Container[str] = ()) -> dict[str, torch.Tensor]:
    """Tensors of `model` in a checkpoint that may be non-finite, by name: parameters and buffers. Those named in
    `exempt` are left out. Of a tensor that is divided over processes, this one's part.
    """
    is_adapted = is_peft_model(model)  # only its trained weights are saved
    # DeepSpeed has this process's part of a weight aside.
    found = [
        (name, local_part(getattr(one, "ds_tensor", one)))
        for name, one in model.named_parameters()
        if one.requires_grad or not is_adapted
    ]
    return {
        name: tensor.detach() if tensor.layout is torch.strided else strided_parts(tensor.detach())[-1]
        for name, tensor in (*found, *(() if is_adapted else _saved_buffers(model)))
        # Other classes and types of one byte are quantized: finite by construction, or unknown to the operation below.
        if type(tensor) in (nn.Parameter, torch.Tensor)
        and not tensor.is_nested
        and tensor.is_floating_point()
        and tensor.element_size() > 1
        and tensor.numel()
        and not tensor.is_meta
        and name not in exempt
    }


def nonfinite_tensors(checked: dict[str, torch.Tensor]) -> list[str]:
    """Names of those that hold NaN or infinity. One pass on the device, one read."""
    if not checked:
        return []
    # A sum is finite only if all its terms are, and on a CPU it runs at memory bandwidth, the maximum at a tenth of it.
    # One that overflowed is checked again.
    if all(tensor.device.type == "cpu" for tensor in checked.values()):
        sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in checked.values()]
        if bool(torch.stack([one.double() for one in sums]).isfinite().all()):
            return []
    largest = torch._foreach_norm(list(checked.values()), math.inf)
    device = largest[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.stack([value.to(device, dtype) for value in largest]).tolist()
    return [name for name, number in zip(checked, numbers, strict=True) if not math.isfinite(number)]


def infinite_by_design(model: nn.Module) -> frozenset[str]:
    """Names of the buffers that hold infinity before training, such as an attention mask: no fault."""
    names = nonfinite_tensors(checkable_tensors(model))
    return frozenset(names).difference(name for name, _ in model.named_parameters())


class NonFiniteWeights(ValueError):
    """The weights of a checkpoint that is being written hold NaN or infinity; `names` says which."""

    concerns_all = True  # of several processes each raises it as it is

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"{len(names)} tensors hold NaN or infinity: {some(names, MAX_NAMED)}")
        self.names = names

    def __reduce__(self) -> tuple[type[NonFiniteWeights], tuple[list[str]]]:
        return NonFiniteWeights, (self.names,)


def may_be_saved(names: Sequence[str], is_bad: bool, step: int, policy: str) -> bool:
    """Whether all weights are finite, on all ranks. If not: NonFiniteError, or with "ignore" a warning and False.

    `names`: this rank's tensors that are not. `is_bad`: whether any rank has one, so that all decide alike.
    """
    if not is_bad:
        return True
    what = "another process has tensors (and names them) that hold"
    if names:
        what = f"{len(names)} of the model's tensors hold"
    message = (
        f"No checkpoint was written at step {step}: {what} NaN or infinity{': ' if names else ''}"
        f"{some(names, MAX_NAMED)}. Nothing could be resumed from it; earlier checkpoints are kept."
    )
    if policy != "ignore":
        raise NonFiniteError(f"{message} Resume from the last one with a lower learning_rate.")
    logger.warning("%s", message)
    return False


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer
