"""GaLore and APOLLO: full training of the weights with an optimizer state of low rank.

Owns: which modules they apply to, the settings in their parameter groups, and the layer-wise variants. Leaves to
others: the projections (galore-torch, apollo-torch), the layer-wise stepping (`layerwise.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trainwright.interop.optional import require
from trainwright.optim.fused_backward import check_in_backward
from trainwright.optim.groups import check_target_module_exists, decay_parameter_names
from trainwright.optim.layerwise import LayerWiseDummyOptimizer
from trainwright.optim.options import with_options
from trainwright.optim.per_module_lr import with_module_lr
from trainwright.optim.registry import OptimizerRequest, OptimizerSpec

logger = logging.getLogger(__name__)

_LAYERWISE = "_layerwise"
GALORE = {"galore_adamw": "GaLoreAdamW", "galore_adamw_8bit": "GaLoreAdamW8bit", "galore_adafactor": "GaLoreAdafactor"}


def galore(request: OptimizerRequest) -> OptimizerSpec:
    """GaLore on AdamW, 8-bit AdamW or Adafactor."""
    module = require("galore_torch", f"optim={request.name!r}", extra="galore")
    base = request.name.removesuffix(_LAYERWISE)
    settings = {
        "rank": request.take("rank", 128),
        "update_proj_gap": request.take("update_proj_gap", 200),
        "scale": request.take("scale", 0.25),
        "proj_type": request.take("proj_type", "std"),
    }
    kwargs = dict(request.lr)
    if base == "galore_adafactor":
        kwargs |= {"scale_parameter": False, "relative_step": False}
    else:
        kwargs |= request.betas | _chosen_eps(request)
    return _spec(request, getattr(module, GALORE[base]), kwargs, settings)


def apollo(request: OptimizerRequest) -> OptimizerSpec:
    """APOLLO; with `optim_args="rank=1,scale_type=tensor"` APOLLO-Mini."""
    module = require("apollo_torch", f"optim={request.name!r}", extra="apollo")
    settings = {
        "rank": request.take("rank", 128),
        "proj": request.take("proj", "random"),
        "scale_type": request.take("scale_type", "channel"),
        "update_proj_gap": request.take("update_proj_gap", 200),
        "scale": request.take("scale", 1.0),
        "proj_type": request.take("proj_type", "std"),
        **request.betas,
        **request.eps,
    }
    return _spec(request, module.APOLLOAdamW, request.lr | request.betas | _chosen_eps(request), settings)


def _chosen_eps(request: OptimizerRequest) -> dict[str, Any]:
    # Where adam_epsilon has its default, the packages' default (1e-6) applies, as documented.
    return request.eps if request.args.adam_epsilon != 1e-8 else {}


def _spec(
    request: OptimizerRequest, cls: Callable[..., Any], kwargs: dict[str, Any], settings: dict[str, Any]
) -> OptimizerSpec:
    cls = _with_plain_projectors(cls)
    model = _model_of(request)
    groups = with_module_lr(_groups(request, model, settings), model, request.per_module_lr)
    if not request.name.endswith(_LAYERWISE):
        return OptimizerSpec(cls, kwargs | {"params": groups})
    check_in_backward(request.name, request.args, instead=request.name.removesuffix(_LAYERWISE))
    if getattr(request.args, "max_grad_norm", None):
        logger.warning(
            "max_grad_norm=%s is not applied: optim=%r updates each weight as soon as its gradient is there, so their "
            "norm is never known. Set max_grad_norm=0, or use optim=%r.",
            request.args.max_grad_norm,
            request.name,
            request.name.removesuffix(_LAYERWISE),
        )
    kwargs = with_options(cls, kwargs, request.options, request.name)
    request.options.clear()
    optimizers = {
        parameter: cls([{**group, "params": [parameter]}], **kwargs)
        for group in groups
        for parameter in group["params"]
    }
    return OptimizerSpec(LayerWiseDummyOptimizer, request.lr | {"optimizer_dict": optimizers})


def _with_plain_projectors(base: Any) -> Any:
    """`base` with projectors saved as plain values, so that a checkpoint holds data alone and no object to unpickle."""

    class WithPlainProjectors(base):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            saved: dict[str, Any] = super().state_dict()
            for number, state in saved["state"].items():
                if "projector" in state:  # a new dict, because the saved one is the one in use
                    saved["state"][number] = {**state, "projector": dict(vars(state["projector"]))}
            return saved

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            states = dict(state_dict["state"])
            for packed, group in zip(state_dict["param_groups"], self.param_groups):
                for number, parameter in zip(packed["params"], group["params"]):
                    values = states.get(number, {}).get("projector")
                    if isinstance(values, dict):
                        # Made before torch loads, which would split the strings in the dict into letters.
                        projector = object.__new__(_projector_class(group))
                        vars(projector).update({name: _moved(value, parameter) for name, value in values.items()})
                        states[number] = {**states[number], "projector": projector}
            super().load_state_dict({**state_dict, "state": states})

    WithPlainProjectors.__name__ = base.__name__
    return WithPlainProjectors


def _moved(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(member, parameter) for member in value)
    return value.to(parameter.device) if isinstance(value, Tensor) else value


def _projector_class(group: dict[str, Any]) -> Any:
    # Chosen by how this optimizer was built, never by the content of a file.
    if "proj" not in group:
        return require("galore_torch.galore_projector", "GaLore", extra="galore").GaLoreProjector
    if group["proj"] == "random":
        return require("apollo_torch.random_projector", "APOLLO", extra="apollo").GradientProjector
    return require("apollo_torch.svd_projector", "APOLLO", extra="apollo").GaLoreProjector


def _groups(request: OptimizerRequest, model: nn.Module, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Other parameters first, then the weights of the target modules with their settings.

    Weight decay splits the first group in two, as documented for every optimizer.
    """
    targets = _target_weights(request, model)
    chosen = {id(parameter) for parameter in targets}
    decay = set(decay_parameter_names(model))
    others = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in chosen]
    weight_decay = request.args.weight_decay
    if not weight_decay:
        return [{"params": [p for _, p in others]}, {"params": targets, **settings}]
    return [
        {"params": [p for n, p in others if n in decay], "weight_decay": weight_decay},
        {"params": [p for n, p in others if n not in decay], "weight_decay": 0.0},
        {"params": targets, "weight_decay": weight_decay, **settings},
    ]


def _model_of(request: OptimizerRequest) -> nn.Module:
    wanted = getattr(request.args, "optim_target_modules", None)
    if request.model is None or wanted is None:
        missing = "the model" if request.model is None else "optim_target_modules"
        raise ValueError(
            f"optim={request.name!r} needs {missing}: name the modules whose gradients are projected, "
            'for instance optim_target_modules=["attn", "mlp"] or "all-linear".'
        )
    return request.model


def _target_weights(request: OptimizerRequest, model: nn.Module) -> list[Tensor]:
    wanted = request.args.optim_target_modules
    if not isinstance(wanted, (str, list, tuple)):
        raise TypeError(f"optim_target_modules={wanted!r} must be a string or a list of strings.")
    every_linear = isinstance(wanted, str) and wanted.replace("_", "-") == "all-linear"
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = [
        module.weight
        for name, module in linear
        if module.weight.requires_grad and (every_linear or check_target_module_exists(wanted, name))
    ]
    if not weights:
        names = [name for name, _ in linear]
        shown = [*names[:8], "..."] if len(names) > 8 else names
        raise ValueError(f"optim_target_modules={wanted!r} matches no trainable linear module; the model has {shown}.")
    return list(dict.fromkeys(weights))  # a weight shared by two modules is one parameter
