"""The norm of all gradients, and clipping it.

Owns: what `torch.nn.utils.clip_grad_norm_` does, bit-identical, with a third of the calls where all gradients are
alike, and for sparse ones, which that refuses. Leaves to others: grouping gradients by device and dtype (torch), when
to clip (the loop).

torch's functions query each tensor's device and dtype several times, move each norm, and enter `no_grad` twice: for a
small model that costs as much as the operations themselves, 30 us of 490 in a step of `benchmarks/step_overhead.py`.
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
    """Norms on the device, whose norm is the norm of all gradients: one scalar per gradient, or a single one where the
    gradients differ in kind. All are finite if and only if the gradients are.
    """
    if _are_alike(gradients):
        return list(torch._foreach_norm(gradients))
    return [_norm_of_several_kinds(gradients)]


def found_nonfinite(tensors: list[torch.Tensor], flag: torch.Tensor, one: torch.Tensor) -> bool:
    """Set `flag` to 1.0 where one of `tensors` is not finite, in one operation. False where they were not checked: they
    differ in kind, are not writable, or have a dtype that a CPU converts there and back, in three times the time of
    norms. `one`: 1.0, on the device of `flag`; the operation, GradScaler's, multiplies all by it.
    """
    if not (_are_alike(tensors) and tensors[0].dtype is torch.float32):
        return False
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, one)
    except RuntimeError:  # not writable, such as an expanded tensor that a user's hook assigned
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
    # Multiplied also where nothing is clipped: a condition would be a host sync.
    torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def _norm_of_several_kinds(gradients: list[torch.Tensor]) -> torch.Tensor:
    """By torch's function, also for sparse gradients, which that does not take."""
    return nn.utils.get_total_norm([one.coalesce().values() if one.is_sparse else one for one in gradients])


def _are_alike(gradients: list[torch.Tensor]) -> bool:
    """Whether all are plain dense tensors of one type on one device, for which torch has operations on lists."""
    kinds = {*map(_kind, gradients)}
    if len(kinds) != 1:
        return False
    ((device, _, layout, class_, requires_grad),) = kinds
    return device.type in ("cpu", "cuda") and layout is torch.strided and class_ is torch.Tensor and not requires_grad
