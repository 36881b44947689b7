"""Optimizers of torchao: AdamW with a quantised state, compiled by torch.

Owns: what each name means. Leaves to others: the arithmetic (torchao).
"""

from __future__ import annotations

from trainwright.interop.optional import require
from trainwright.optim.registry import OptimizerRequest, OptimizerSpec

VARIANTS = {"adamw_torch_4bit": "AdamW4bit", "adamw_torch_8bit": "AdamW8bit"}


def build(request: OptimizerRequest) -> OptimizerSpec:
    """The class of torchao for one of the names in `VARIANTS`."""
    module = require("torchao.optim", f"optim={request.name!r}", extra="torchao")
    # 256 numbers share a scale, as documented; part of saved states. The package would take 128 for 4 bits.
    block_size = {"block_size": request.take("block_size", 256)}
    return OptimizerSpec(getattr(module, VARIANTS[request.name]), request.adam | block_size)
