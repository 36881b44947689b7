"""Adafactor: Adam's second moment stored as one row and one column per matrix, and the schedule that reads its rate.

Owns: the optimizer and `AdafactorSchedule`. Leaves to others: which parameters it gets (`groups.py`).
Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from trainwright.optim.per_parameter import PerParameterOptimizer


class Adafactor(PerParameterOptimizer):
    """Adafactor with its documented arguments.

    - `lr`: an external learning rate; needs `relative_step=False`.
    - `eps`: added to squared gradients, and the smallest parameter scale.
    - `clip_threshold`: largest root mean square of an update.
    - `decay_rate`: exponent of the second moment's decay: 1 - step ** decay_rate.
    - `beta1`: first moment, None to do without (and without its memory).
    - `scale_parameter`: multiply the rate by the root mean square of the parameter.
    - `relative_step`: a rate that falls as one over the square root of the update; `warmup_init`: it starts at 1e-6.

    Half-precision parameters are updated in float32 and rounded once. The state never leaves the device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        if lr is not None and relative_step:
            raise ValueError(
                f"lr={lr} cannot be combined with relative_step=True, which computes its own; set one of them."
            )
        if warmup_init and not relative_step:
            raise ValueError("warmup_init=True shapes the relative step, so it requires relative_step=True.")
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        super().__init__(params, defaults)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            raise RuntimeError("Adafactor cannot use sparse gradients; build the embedding with sparse=False.")
        gradient = gradient.float()
        value = parameter.float()  # the parameter itself where it is float32, else a copy
        state = self.state[parameter]
        factored = gradient.dim() >= 2
        if not state:
            state["step"] = 0
            if group["beta1"] is not None:
                state["exp_avg"] = torch.zeros_like(gradient)
            if factored:
                state["exp_avg_sq_row"] = gradient.new_zeros(gradient.shape[:-1])
                state["exp_avg_sq_col"] = gradient.new_zeros(gradient.shape[:-2] + gradient.shape[-1:])
            else:
                state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        state["RMS"] = _root_mean_square(value)
        lr = _parameter_lr(group, state)

        # v <- b v + (1 - b) (g^2 + eps), b = 1 - t ** decay_rate; of a matrix only row and column means are stored
        weight = state["step"] ** group["decay_rate"]
        squared = gradient.square().add_(group["eps"][0])
        if factored:
            row = state["exp_avg_sq_row"].lerp_(squared.mean(dim=-1), weight)  # (..., rows)
            column = state["exp_avg_sq_col"].lerp_(squared.mean(dim=-2), weight)  # (..., columns)
            # 1 / sqrt(v), with v = row column / mean(row)
            row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            update = gradient * row_factor * column.rsqrt().unsqueeze(-2)
        else:
            update = gradient * state["exp_avg_sq"].lerp_(squared, weight).rsqrt()

        # u <- lr u / max(1, RMS(u) / d)
        update.div_((_root_mean_square(update) / group["clip_threshold"]).clamp_(min=1.0)).mul_(lr)
        if group["beta1"] is not None:
            update = state["exp_avg"].lerp_(update, 1.0 - group["beta1"])
        if group["weight_decay"] != 0:
            value.sub_(value * lr, alpha=group["weight_decay"])
        value.sub_(update)
        if value is not parameter:
            parameter.copy_(value)


def _parameter_lr(group: dict[str, Any], state: dict[str, Any]) -> Any:
    """The rate of one parameter at its current step: a tensor on its device where it depends on the parameter."""
    # rho = lr, or min(1e-2, 1 / sqrt(t)), or with warmup_init min(1e-6 t, 1 / sqrt(t))
    # rate = rho max(eps, RMS(parameter))
    rate = group["lr"]
    if group["relative_step"]:
        largest = 1e-6 * state["step"] if group["warmup_init"] else 1e-2
        rate = min(largest, state["step"] ** -0.5)
    if group["scale_parameter"]:
        rate = rate * state["RMS"].clamp(min=group["eps"][1])
    return rate


def _root_mean_square(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.div_(tensor.numel() ** 0.5)


def _fixed(step: int, initial_lr: float) -> float:
    return initial_lr


class AdafactorSchedule(LambdaLR):
    """Reports the rate that Adafactor computes for itself, so that it can be logged; it changes nothing.

    One value per parameter group, that of its first parameter; `initial_lr` until that parameter was updated once.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float = 0.0) -> None:
        for group in optimizer.param_groups:
            group["initial_lr"] = initial_lr
        super().__init__(optimizer, partial(_fixed, initial_lr=initial_lr))
        for group in optimizer.param_groups:
            del group["initial_lr"]

    def get_lr(self) -> list[Any]:
        """The rates of the last update; tensors where they depend on a parameter."""
        rates = []
        for group, initial_lr in zip(self.optimizer.param_groups, self.base_lrs):
            state = self.optimizer.state.get(group["params"][0])
            rates.append(_parameter_lr(group, state) if state and "RMS" in state else initial_lr)
        return rates


def get_adafactor_schedule(optimizer: Optimizer, initial_lr: float = 0.0) -> AdafactorSchedule:
    """`AdafactorSchedule`: the documented companion of `Adafactor(lr=None)`."""
    return AdafactorSchedule(optimizer, initial_lr)
