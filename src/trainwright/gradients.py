"""The norm of all gradients, and scaling them down to a largest one.

Owns: doing what `torch.nn.utils.clip_grad_norm_` does, to the bit, with a third of the calls where all gradients are of
one kind, and for sparse ones, which that refuses. Leaves to others: grouping gradients of several kinds (torch's own
functions), when to clip (the loop).

torch's functions ask each tensor for its device and type several times, move each norm, and enter `no_grad` twice: for
a small model that costs as much again as the operations, 30 us of 490 in a step of `benchmarks/step_overhead.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import nn

# One call for each gradient, in C.
_kind = operator.attrgetter("device", "dtype", "layout", "__class__", "requires_grad")


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [gradient for parameter in parameters if (gradient := parameter.grad) is not None]


def norms_of(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Scalars on the device that are finite, all of them, if and only if the gradients are; their norm is the norm of
    all. One per gradient, or a single one where they are of several kinds.
    """
    if _are_alike(gradients):
        return list(torch._foreach_norm(gradients))
    return [_norm_of_several_kinds(gradients)]


def found_nonfinite(tensors: list[torch.Tensor], flag: torch.Tensor, one: torch.Tensor) -> bool:
    """Set `flag` to 1.0 where one of `tensors` is not finite, in one operation. False where they were not looked at:
    they are of several kinds, may not be written to, or are of a type that a CPU converts there and back, in three
    times the time that norms take. `one`: 1.0, beside `flag`; the operation, GradScaler's, multiplies all by it.
    """
    if not (_are_alike(tensors) and tensors[0].dtype is torch.float32):
        return False
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, one)
    except RuntimeError:  # one that may not be written to, such as an expanded one that a user's hook assigned
        return False
    return True


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to `max_norm`, in place; return the norm they had, on their device."""
    parameters = list(parameters)
    gradients = gradients_of(parameters)
    norm: torch.Tensor
    if not _are_alike(gradients):
        norm = _norm_of_several_kinds(gradients)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    # Multiplied also where nothing is to clip: asking first would make the host wait for the device.
    torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def _norm_of_several_kinds(gradients: list[torch.Tensor]) -> torch.Tensor:
    """By torch's own function, also of sparse gradients, which that does not take."""
    return nn.utils.get_total_norm([one.coalesce().values() if one.is_sparse else one for one in gradients])


def _are_alike(gradients: list[torch.Tensor]) -> bool:
    """Whether all are plain dense tensors of one type on one device, for which torch has operations on lists."""
    kinds = {*map(_kind, gradients)}
    if len(kinds) != 1:
        return False
    ((device, _, layout, class_, requires_grad),) = kinds
    return device.type in ("cpu", "cuda") and layout is torch.strided and class_ is torch.Tensor and not requires_grad
