"""AdamW with a separate precision for its moments, and optional Kahan compensation of rounding errors.

Owns: `AnyPrecisionAdamW`, under its documented arguments; torchdistx, the package it once came from, is archived and
does not install. Leaves to others: when plain AdamW is enough (it is, with float32 parameters).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainwright.optim.per_parameter import PerParameterOptimizer


class AnyPrecisionAdamW(PerParameterOptimizer):
    """AdamW for parameters in bfloat16.

    - `momentum_dtype`, `variance_dtype`: precision of the first and the second moment.
    - `use_kahan_summation`: accumulate the rounding error of each update in a buffer of `compensation_buffer_dtype` and
      add it to the next, so that updates smaller than the precision of the parameter are not lost.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        use_kahan_summation: bool = False,
        momentum_dtype: torch.dtype = torch.float32,
        variance_dtype: torch.dtype = torch.float32,
        compensation_buffer_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "use_kahan_summation": use_kahan_summation,
            "momentum_dtype": momentum_dtype,
            "variance_dtype": variance_dtype,
            "compensation_buffer_dtype": compensation_buffer_dtype,
        }
        super().__init__(params, defaults)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=group["momentum_dtype"])
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=group["variance_dtype"])
            if group["use_kahan_summation"]:
                state["compensation"] = torch.zeros_like(parameter, dtype=group["compensation_buffer_dtype"])
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(gradient.to(state["exp_avg"].dtype), 1 - beta1)
        variance = state["exp_avg_sq"]
        wide = gradient.to(variance.dtype)
        variance.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        correction1 = 1 - beta1 ** state["step"]
        correction2 = 1 - beta2 ** state["step"]
        if group["weight_decay"] != 0:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (variance.sqrt() / correction2**0.5).add_(group["eps"])
        update = mean / denominator * (-group["lr"] / correction1)
        if not group["use_kahan_summation"]:
            parameter.add_(update)
            return
        # Kahan: add the update and the earlier rounding error; the new error is what did not arrive.
        compensation = state["compensation"].add_(update)
        before = parameter.clone()
        parameter.add_(compensation)
        compensation.add_(before.sub_(parameter))
