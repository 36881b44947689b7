"""Liger kernels: faster, leaner Triton kernels for some `transformers` models.

Owns: asking the liger-kernel package to patch one model. Leaves to others: when (Trainer construction).
Source: seed 001 (`use_liger_kernel`, `liger_kernel_config`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trainwright.interop.loaded import is_pretrained_model
from trainwright.interop.models import base_model_of
from trainwright.interop.optional import require


def apply_liger_kernels(model: nn.Module, config: dict[str, bool] | None) -> None:
    """Replace layers of `model` by Liger's. `config` switches kernels on and off by name (rope, swiglu, rms_norm ...).

    Raises MissingExtra without the package, ValueError for a model that is not a `transformers` model.
    """
    base: Any = base_model_of(model)
    if not is_pretrained_model(base):
        raise ValueError(
            f"use_liger_kernel=True works for transformers models; {type(base).__name__} is not one. Leave it unset."
        )
    transformers = require("liger_kernel.transformers", "use_liger_kernel=True", package="liger-kernel", extra="liger")
    transformers._apply_liger_kernel_to_instance(model=base, **(config or {}))
