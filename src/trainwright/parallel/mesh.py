"""Gradients and parameters on device meshes (DTensor), and replicated ones next to them.

Owns: one gradient norm over several meshes, keeping replicated parameters equal. Leaves to others: making the meshes.
On one device nothing here is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def _mesh_of(tensor: torch.Tensor) -> Any:
    return getattr(tensor, "device_mesh", None)


def has_mixed_meshes(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the gradients are on more than one mesh, or only some on a mesh: torch cannot stack those."""
    meshes: list[Any] = []
    for parameter in parameters:
        if parameter.grad is not None and not any(_mesh_of(parameter.grad) is mesh for mesh in meshes):
            meshes.append(_mesh_of(parameter.grad))
    return len(meshes) > 1


def clip_mixed_meshes(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """`clip_grad_norm_` for gradients on several meshes: one norm for each mesh, then one over those."""
    by_mesh: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(id(_mesh_of(parameter.grad)), []).append(parameter)
    if not by_mesh:
        return torch.zeros(())
    found = [p.grad for group in by_mesh.values() for p in group if p.grad is not None]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms_by_mesh(found)))
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def norms_by_mesh(gradients: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The norm of the gradients on each mesh, and of those on none, whole on every process."""
    by_mesh: dict[int, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(id(_mesh_of(gradient)), []).append(gradient)
    norms: list[Any] = [nn.utils.get_total_norm(group) for group in by_mesh.values()]
    return [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]


def broadcast_replicated(model: nn.Module) -> None:
    """Broadcast the trainable parameters of rank 0 that are not on a mesh."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and _mesh_of(parameter) is None:
            torch.distributed.broadcast(parameter.data, src=0)
