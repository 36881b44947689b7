"""Tensors of which each process has a part (DTensor), for code that knows no engine.

Owns: the local part of a tensor, the whole of it, and a whole tensor divided as another one is. Leaves to others: which
tensors are divided (`parallel/fsdp.py`). Of an ordinary tensor each function gives the tensor back, without a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor; asked of what it has, since importing the class costs half a second."""
    return getattr(tensor, "device_mesh", None) is not None and hasattr(tensor, "placements")


def local_part(tensor: Any) -> Any:
    """The part of this process, in the same memory, without a graph."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def reshard(model: nn.Module) -> None:
    """Free the whole weights that a forward pass left behind, so that the next one gathers them anew."""
    for module in model.modules():
        drop = getattr(module, "reshard", None)
        if drop is not None and hasattr(module, "unshard"):  # FSDPModule
            drop()


def whole(tensor: Any, keep: bool = True) -> Any:
    """All parts together, on the host: a collective of the processes that have them.

    `keep`: whether this process wants the result; else it takes part and gets None.
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        full = tensor.full_tensor()
        return full.cpu() if keep else None


def whole_of_part(part: torch.Tensor, like: Any, keep: bool = True) -> Any:
    """All parts of what is divided as `like` is, of which this process has `part`: a collective, as `whole`."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole(sharded, keep)


def divided_as(like: Any, tensor: Any) -> Any:
    """The whole `tensor`, which every process has, as a DTensor divided as `like` is; no communication."""
    if not (is_sharded(like) and isinstance(tensor, torch.Tensor)) or is_sharded(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole_state(state: Any, keep: bool = True) -> Any:
    """A state dict, nested, with each DTensor as a whole one on the host: a collective. `keep`: as for `whole`."""
    if isinstance(state, Mapping):
        return {key: whole_state(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole_state(value, keep) for value in state)
    return whole(state, keep)


def divided_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The saved `state` of an optimizer with what has the shape of a divided parameter divided as it is.

    Parameters are known by their place in the groups, as torch's optimizers save them.
    """
    groups, saved = getattr(optimizer, "param_groups", None), state.get("param_groups")
    values = state.get("state")
    if not (isinstance(groups, list) and isinstance(saved, list) and isinstance(values, dict)):
        return state
    of_number: dict[Any, Any] = {}
    for ours, theirs in zip(groups, saved):
        numbers = theirs.get("params") if isinstance(theirs, dict) else None
        of_number |= dict(zip(numbers if isinstance(numbers, list) else (), ours["params"]))
    divided = {
        number: {name: divided_as(of_number.get(number), value) for name, value in of_parameter.items()}
        if isinstance(of_parameter, dict)
        else of_parameter
        for number, of_parameter in values.items()
    }
    return {**state, "state": divided}


def whole_weights(model: nn.Module, keep: bool, names: Any = None) -> dict[str, Any]:
    """The state dict of `model` with whole tensors, on the host: a collective. Names that share a tensor still do.

    `keep`: as for `whole`; where it is not wanted the result is empty. `names`: those that are wanted; None: all.
    """
    found: dict[str, Any] = {}
    known: dict[int, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if names is not None and name not in names:
            continue
        if id(value) not in known:
            known[id(value)] = whole(value.detach() if isinstance(value, torch.Tensor) else value, keep)
        found[name] = known[id(value)]
    return found if keep else {}
