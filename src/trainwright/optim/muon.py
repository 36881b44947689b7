"""Muon for the hidden matrices, AdamW for everything else, as one optimizer.

Owns: `MuonWithAdamW` and the rule that assigns parameters to the two. Leaves to others: both algorithms
(`torch.optim`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainwright.optim.combined import CombinedOptimizer
from trainwright.optim.groups import decay_parameter_names, parameter_groups

_HEAD_NAMES = ("lm_head", "classifier", "score", "head")  # last part of the name of an output module


class MuonWithAdamW(CombinedOptimizer):
    """Groups marked `use_muon=True` are updated by `torch.optim.Muon`, the others by `torch.optim.AdamW`.

    The update of Muon is scaled to the size of AdamW's (`adjust_lr_fn="match_rms_adamw"`), so one rate serves both.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        groups = [dict(group) for group in params if group["params"]]
        matrices = [group for group in groups if group.get("use_muon")]
        others = [group for group in groups if not group.get("use_muon")]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            optimizers.append(
                torch.optim.Muon(
                    matrices,
                    lr=lr,
                    weight_decay=weight_decay,
                    momentum=momentum,
                    nesterov=nesterov,
                    ns_steps=ns_steps,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            optimizers.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        super().__init__(optimizers, {"lr": lr, "weight_decay": weight_decay})


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decaying and other parameters as documented, and the decaying ones split into hidden matrices and the rest.

    A hidden matrix has two dimensions and belongs neither to an embedding nor to the output module.
    """
    outside = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in _HEAD_NAMES
        for parameter in module.parameters()
    }
    decaying, others = parameter_groups(model, weight_decay, decay_parameter_names(model))
    matrices = [p for p in decaying["params"] if p.dim() == 2 and id(p) not in outside]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in decaying["params"] if id(parameter) not in chosen]
    return [
        {"params": matrices, "weight_decay": weight_decay, "use_muon": True},
        {"params": rest, "weight_decay": weight_decay, "use_muon": False},
        {**others, "use_muon": False},
    ]
