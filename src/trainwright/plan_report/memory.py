"""What a training holds in memory besides activations: weights, gradients, what the optimizer keeps.

Owns: counting these, and what the device has. Leaves to others: activations (`activations`), the optimizer's size on
disk (`disk`).

The optimizer's state is found by one step of a copy of it on tensors without memory, so it is what the real step makes,
options and all, to the byte.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainwright.evaluation.spill import available_bytes
from trainwright.optim.fused_backward import updates_in_backward

logger = logging.getLogger(__name__)

# Their steps hand addresses to compiled code, and a tensor without memory has none.
_NOT_IN_PYTHON = ("bitsandbytes", "torchao", "apex", "deepspeed", "torch_npu")


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory that `tensors` lie in; what several share is counted once."""
    storages = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and not tensor.is_nested and type(tensor) in (torch.Tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        else:  # divided, sparse, quantised: it knows its own size
            storages[-id(tensor)] = getattr(tensor, "nbytes", 0)
    return sum(storages.values())


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """How many numbers the parameters of `model` have (`total`), and how many of them are trained (`trained`)."""
    parameters = list(model.parameters())
    return {
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "total": sum(parameter.numel() for parameter in parameters),
    }


def gradient_bytes(model: nn.Module, *, freed_in_backward: bool) -> int:
    """Bytes of all gradients at the end of a backward pass; of the largest, where each is used and freed at once."""
    sizes = [parameter.nbytes for parameter in model.parameters() if parameter.requires_grad]
    return max(sizes, default=0) if freed_in_backward else sum(sizes)


def optimizer_bytes(optimizer: Any) -> int | None:
    """Bytes that `optimizer`, which is not changed, keeps from one step to the next; None where that stays unknown."""
    inner = getattr(optimizer, "optimizers", None)
    if isinstance(inner, list):
        found = [optimizer_bytes(one) for one in inner]
        return None if None in found else sum(size for size in found if size is not None)
    if getattr(optimizer, "state", None):
        return _bytes_of_state(optimizer.state)
    if type(optimizer).__module__.partition(".")[0] in _NOT_IN_PYTHON or not isinstance(
        optimizer, torch.optim.Optimizer
    ):
        return None
    if updates_in_backward(optimizer):
        return None
    try:
        shadow = shadow_of(optimizer, to_meta=True)
        shadow.step()
    except Exception as error:
        logger.debug("The state of %s could not be found out: %s", type(optimizer).__name__, error)
        return None
    return _bytes_of_state(shadow.state)


def shadow_of(optimizer: Any, *, to_meta: bool = False) -> Any:
    """A copy of `optimizer` with separate groups: what steps it, or puts a schedule on it, leaves the original alone.

    to_meta: its parameters, and a gradient for each, are tensors without memory, and it has no state yet.
    """
    shadow = object.__new__(type(optimizer))
    vars(shadow).update(vars(optimizer))
    vars(shadow).pop("step", None)  # as a schedule wraps it: bound to the original
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        vars(shadow)[name] = OrderedDict()
    shadow.defaults = copy.copy(optimizer.defaults)
    shadow.param_groups = [dict(group) for group in optimizer.param_groups]
    if to_meta:
        shadow.state = defaultdict(dict)
        for group in shadow.param_groups:
            group["params"] = [_without_memory(parameter) for parameter in group["params"]]
            for name in ("foreach", "fused", "capturable"):  # how a step is computed, not what is kept
                if group.get(name):
                    group[name] = False
    return shadow


def _without_memory(parameter: torch.Tensor) -> nn.Parameter:
    meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
    if parameter.requires_grad:
        meta.grad = torch.empty_like(meta)
    return meta


def _bytes_of_state(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return int(state.nbytes)
    if isinstance(state, (list, tuple)):
        return sum(map(_bytes_of_state, state))
    return sum(map(_bytes_of_state, state.values())) if isinstance(state, dict) else 0


def device_memory(device: torch.device) -> dict[str, int | None]:
    """`total_bytes` of a device's memory and `free_bytes` that this process can still use; None where unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return {"total_bytes": total, "free_bytes": free + cached}
    if device.type != "cpu":
        return {"total_bytes": None, "free_bytes": None}
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return {"total_bytes": None, "free_bytes": available_bytes()}
    free_here = available_bytes()
    return {"total_bytes": total, "free_bytes": None if free_here is None or math.isinf(free_here) else free_here}
