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
    """The base model with the active adapters of `model` merged into its weights; `model` is unchanged.

    A copy, because unmerging an adapter does not restore the weights exactly, and training would no longer be
    bit-exact. Costs the memory of the whole model once more, on its device.

    Raises ValueError for a model without adapters, a quantised one, and adapters that cannot be merged (prompts).
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
    _untie_adapted_weights(tuner)
    merged: nn.Module = tuner.merge_and_unload(safe_merge=True)
    return merged


def _untie_adapted_weights(tuner: Any) -> None:
    """Copy the weight of an adapted layer where another module shares it, as embedding and head often do: the adapter
    changes only that layer.
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
