"""Adapters of peft: merged into the weights they adapt.

Owns: a merged copy of a model. Leaves to others: training, saving and loading adapters as they are (Trainer,
`checkpoint/weights.py`).
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from torch import nn

from trainwright.interop.loaded import is_peft_model
from trainwright.interop.models import is_quantised


def merged_copy(model: nn.Module) -> nn.Module:
    """The base model with the active adapters of `model` added to its weights; `model` itself stays as it is.

    A copy, because taking an adapter out again leaves other numbers than were there, and training would no longer go on
    to the bit. Costs the memory of the whole model once more, where it lies.

    Raises ValueError for a model without adapters, a quantised one, and adapters that are no part of weights (prompts).
    """
    name = type(model).__name__
    if not is_peft_model(model):
        remedy = "Use save_model()."
        if getattr(model, "_hf_peft_config_loaded", False):
            remedy = "It carries its adapter without a wrapper: build it with peft.get_peft_model() instead."
        raise ValueError(f"save_merged_model() merges the adapters of a peft model, and {name} is none. {remedy}")
    wrapper: Any = model
    if is_quantised(wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper):
        raise ValueError(
            "save_merged_model() cannot add an adapter to quantised weights without rounding it away: save the adapter "
            "with save_model(), load the base model unquantised, and merge there with merge_and_unload()."
        )
    if not hasattr(type(wrapper.base_model), "merge_and_unload"):
        kinds = sorted({type(config).__name__ for config in wrapper.peft_config.values()})
        raise ValueError(
            f"save_merged_model() cannot merge {', '.join(kinds)}: it adds inputs, no weights. Use save_model(), and "
            "load the base model with it."
        )
    tuner: Any = copy.deepcopy(wrapper.base_model)
    _part_shared_weights(tuner)
    merged: nn.Module = tuner.merge_and_unload(safe_merge=True)
    return merged


def _part_shared_weights(tuner: Any) -> None:
    """Give an adapted layer a weight of its own where another module has the same one, as embedding and head often do:
    the adapter changes only what the one layer computes.
    """
    users = Counter(id(weight) for module in tuner.modules() for weight in module._parameters.values())
    for module in tuner.modules():
        layer: Any = module.get_base_layer() if hasattr(module, "get_base_layer") and hasattr(module, "merge") else None
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and users[id(weight)] > 1:
            layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            config: Any = getattr(tuner.model, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
