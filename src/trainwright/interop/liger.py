"""Liger kernels: faster, leaner Triton kernels for some `transformers` models.

Owns: patching one model with the liger-kernel package. Leaves to others: when (Trainer construction).
Source: seed 001 (`use_liger_kernel`, `liger_kernel_config`).
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from trainwright.interop.loaded import is_pretrained_model
from trainwright.interop.models import base_model_of
from trainwright.interop.optional import require
from trainwright.names import closest


def apply_liger_kernels(model: nn.Module, config: dict[str, bool] | None) -> None:
    """Replace layers of `model` by Liger's. `config` switches kernels on and off by name (rope, swiglu, rms_norm ...).

    Raises MissingExtra without the package, ValueError for a model or a kernel that it does not know (which the package
    itself ignores silently).
    """
    base: Any = base_model_of(model)
    if not is_pretrained_model(base):
        raise ValueError(
            f"use_liger_kernel=True works for transformers models; {type(base).__name__} is not one. Leave it unset."
        )
    module = "liger_kernel.transformers.monkey_patch"
    patches = require(module, "use_liger_kernel=True", package="liger-kernel", extra="liger")
    known, kind = patches.MODEL_TYPE_TO_APPLY_LIGER_FN, base.config.model_type
    if kind not in known:
        raise ValueError(
            f"use_liger_kernel=True: the installed liger-kernel has no kernels for {type(base).__name__} (model_type "
            f"{kind!r}), only for {sorted(known)}. Leave it unset, or upgrade liger-kernel."
        )
    kernels = [name for name in inspect.signature(known[kind]).parameters if name != "model"]
    for name in config or {}:
        if name not in kernels:
            raise ValueError(
                f"liger_kernel_config={config!r}: there is no kernel {name!r} for {kind!r} models; choose among "
                f"{kernels}.{closest(name, kernels)}"
            )
    patches._apply_liger_kernel_to_instance(model=base, **(config or {}))
