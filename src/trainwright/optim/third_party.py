"""Optimizers of small packages: apex, GrokAdamW, schedule-free, StableAdamW, and AdamW of any precision.

Owns: which arguments of a run each takes. Leaves to others: options from `optim_args` (added by `registry.py`).
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from trainwright.interop.optional import require
from trainwright.names import SchedulerType, closest
from trainwright.optim.registry import OptimizerRequest, OptimizerSpec

logger = logging.getLogger(__name__)

SCHEDULE_FREE = {
    "schedule_free_radam": "RAdamScheduleFree",
    "schedule_free_adamw": "AdamWScheduleFree",
    "schedule_free_sgd": "SGDScheduleFree",
}


def apex(request: OptimizerRequest) -> OptimizerSpec:
    module = require("apex.optimizers", f"optim={request.name!r}", package="git+https://github.com/NVIDIA/apex")
    return OptimizerSpec(module.FusedAdam, request.adam)


def any_precision(request: OptimizerRequest) -> OptimizerSpec:
    from trainwright.optim.any_precision import AnyPrecisionAdamW

    dtypes = {"momentum_dtype": "float32", "variance_dtype": "float32", "compensation_buffer_dtype": "bfloat16"}
    chosen = {name: _dtype(name, request.take(name, default)) for name, default in dtypes.items()}
    return OptimizerSpec(AnyPrecisionAdamW, request.adam | chosen)


def _dtype(argument: str, name: str) -> torch.dtype:
    allowed = ("float32", "bfloat16", "float16", "float64")
    if name.removeprefix("torch.") not in allowed:
        raise ValueError(
            f"optim_args: {argument}={name!r} is no precision; choose one of {allowed}.{closest(name, allowed)}"
        )
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype


def grokadamw(request: OptimizerRequest) -> OptimizerSpec:
    module = require("grokadamw", f"optim={request.name!r}", extra="grokadamw")
    return OptimizerSpec(_resumable(module.GrokAdamW), request.adam)


def _resumable(base: Any) -> Any:
    """GrokAdamW with a state that can be saved.

    The package stores its moments in the groups, keyed by the parameter objects of the process, so that after a resume
    they would never be found.
    """

    class GrokAdamW(base):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            saved: dict[str, Any] = super().state_dict()
            for packed, group in zip(saved["param_groups"], self.param_groups):
                moments = packed.pop("state", {})
                for number, parameter in zip(packed["params"], group["params"]):
                    if parameter in moments:
                        saved["state"][number] = moments[parameter]
            return saved

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
            moments = copy.deepcopy(state_dict["state"])
            for packed, group in zip(state_dict["param_groups"], self.param_groups):
                pairs = zip(packed["params"], group["params"])
                group["state"] = {parameter: moments[number] for number, parameter in pairs if number in moments}

    return GrokAdamW


def schedule_free(request: OptimizerRequest) -> OptimizerSpec:
    """The warm-up is built in; `train()` and `eval()` switch between the two sets of weights."""
    module = require("schedulefree", f"optim={request.name!r}", extra="schedulefree")
    schedule = SchedulerType(getattr(request.args, "lr_scheduler_type", "constant")).value
    if not schedule.startswith("constant"):
        logger.warning(
            "optim=%r needs no decay of the learning rate, and lr_scheduler_type=%r is one: set it to 'constant'.",
            request.name,
            schedule,
        )
    kwargs: dict[str, Any] = {"weight_decay": request.args.weight_decay}
    kwargs |= request.lr if request.name == "schedule_free_sgd" else request.adam
    if request.name != "schedule_free_radam":  # RAdam needs no warmup
        kwargs["warmup_steps"] = _warmup_steps(request)
    return OptimizerSpec(getattr(module, SCHEDULE_FREE[request.name]), kwargs)


def _warmup_steps(request: OptimizerRequest) -> int:
    args = request.args
    # A warmup given as a share needs the length of the run, which is known here only where max_steps fixes it.
    max_steps: int = getattr(args, "max_steps", -1)
    if max_steps > 0:
        steps: int = args.get_warmup_steps(max_steps)
        return steps
    share = getattr(args, "warmup_ratio", 0.0) or getattr(args, "warmup_steps", 0) % 1
    if share and getattr(args, "lr_scheduler_type", None) == "constant":
        raise ValueError(
            f"A warmup of {share} of the run cannot be given to optim={request.name!r}, which does it itself and must "
            "know its length: set warmup_steps to a number of updates, or set max_steps."
        )
    return int(getattr(args, "warmup_steps", 0))


def stable_adamw(request: OptimizerRequest) -> OptimizerSpec:
    module = require("optimi", f"optim={request.name!r}", extra="optimi")
    return OptimizerSpec(module.StableAdamW, request.adam | {"weight_decay": request.args.weight_decay})
