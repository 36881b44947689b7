"""Optimizers that need nothing but torch, or a device's own build of it.

Owns: which arguments of a run each takes. Leaves to others: options from `optim_args` (added by `registry.py`).
"""

from __future__ import annotations

import torch

from trainwright.interop.optional import require
from trainwright.optim.adafactor import Adafactor
from trainwright.optim.registry import OptimizerRequest, OptimizerSpec


def adamw(request: OptimizerRequest) -> OptimizerSpec:
    return OptimizerSpec(torch.optim.AdamW, request.adam)


def adamw_fused(request: OptimizerRequest) -> OptimizerSpec:
    return OptimizerSpec(torch.optim.AdamW, request.adam | {"fused": True})


def adamw_xla(request: OptimizerRequest) -> OptimizerSpec:
    syncfree = require("torch_xla.amp.syncfree", f"optim={request.name!r}", package="torch_xla")
    return OptimizerSpec(syncfree.AdamW, request.adam)


def adamw_npu(request: OptimizerRequest) -> OptimizerSpec:
    torch_npu = require("torch_npu", f"optim={request.name!r}")
    return OptimizerSpec(torch_npu.optim.NpuFusedAdamW, request.adam)


def adafactor(request: OptimizerRequest) -> OptimizerSpec:
    # With a learning rate of the run's own, Adafactor's relative step and parameter scale are off, as documented.
    return OptimizerSpec(Adafactor, request.lr | {"scale_parameter": False, "relative_step": False})


def sgd(request: OptimizerRequest) -> OptimizerSpec:
    return OptimizerSpec(torch.optim.SGD, request.lr)


def adagrad(request: OptimizerRequest) -> OptimizerSpec:
    return OptimizerSpec(torch.optim.Adagrad, request.lr)


def rmsprop(request: OptimizerRequest) -> OptimizerSpec:
    return OptimizerSpec(torch.optim.RMSprop, request.lr)


def muon(request: OptimizerRequest) -> OptimizerSpec:
    from trainwright.optim.muon import MuonWithAdamW, muon_groups
    from trainwright.optim.per_module_lr import with_module_lr

    if request.model is None:
        raise ValueError("optim='muon' chooses parameters by their module, so it needs the model; model is None.")
    groups = with_module_lr(muon_groups(request.model, request.args.weight_decay), request.model, request.per_module_lr)
    return OptimizerSpec(MuonWithAdamW, request.adam | {"params": groups})
