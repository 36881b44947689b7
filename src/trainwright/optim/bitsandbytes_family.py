"""Optimizers of bitsandbytes: 8-bit state, and state that is paged to the host.

Owns: what each name means, and a 32-bit state for embeddings. Leaves to others: the arithmetic (bitsandbytes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainwright.interop.optional import require
from trainwright.optim.registry import OptimizerRequest, OptimizerSpec

# name -> class, bits of the state, paged (None: the class has no such argument)
VARIANTS: dict[str, tuple[str, int, bool | None]] = {
    "adamw_bnb_8bit": ("AdamW", 8, False),
    "adamw_8bit": ("AdamW", 8, False),
    "paged_adamw_32bit": ("AdamW", 32, True),
    "paged_adamw_8bit": ("AdamW", 8, True),
    "ademamix": ("AdEMAMix", 32, False),
    "ademamix_8bit": ("AdEMAMix", 8, False),
    "paged_ademamix_32bit": ("AdEMAMix", 32, True),
    "paged_ademamix_8bit": ("AdEMAMix", 8, True),
    "lion_32bit": ("Lion", 32, False),
    "lion_8bit": ("Lion", 8, False),
    "paged_lion_32bit": ("Lion", 32, True),
    "paged_lion_8bit": ("Lion", 8, True),
    "rmsprop_bnb": ("RMSprop", 32, None),
    "rmsprop_bnb_8bit": ("RMSprop", 8, None),
    "rmsprop_bnb_32bit": ("RMSprop", 32, None),
}


def build(request: OptimizerRequest) -> OptimizerSpec:
    """The class of bitsandbytes for one of the names in `VARIANTS`."""
    module = require("bitsandbytes.optim", f"optim={request.name!r}", extra="bitsandbytes")
    class_name, optim_bits, is_paged = VARIANTS[request.name]
    kwargs: dict[str, Any] = request.lr | {"optim_bits": optim_bits}
    if is_paged is not None:
        # On a CPU the package pages nothing; its AdEMAMix allocates paged memory anyway, above 100,000 numbers.
        kwargs["is_paged"] = is_paged and not (class_name == "AdEMAMix" and _is_on_cpu(request.model))
    if class_name == "AdEMAMix":
        beta3 = request.take("beta3", 0.9999)
        kwargs |= {"betas": (*request.betas["betas"], beta3), "alpha": request.take("alpha", 5.0)} | request.eps
    elif class_name == "Lion":
        kwargs |= request.betas
    elif class_name == "AdamW":
        kwargs |= request.adam
    return OptimizerSpec(getattr(module, class_name), kwargs)


def _is_on_cpu(model: nn.Module | None) -> bool:
    parameter = None if model is None else next(model.parameters(), None)
    return not torch.cuda.is_available() if parameter is None else parameter.device.type == "cpu"


def keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Ask bitsandbytes for a 32-bit state of every embedding: rare rows get few updates, and 8 bits would lose them."""
    manager = require(
        "bitsandbytes.optim", "an 8-bit optimizer", extra="bitsandbytes"
    ).GlobalOptimManager.get_instance()
    # Stored by group and position for all optimizers: overrides of an earlier one would apply to this one's parameters.
    manager.index2config.clear()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
