"""Whether a model shifts its labels: it predicts the next token from labels aligned with its inputs.

Owns: detecting that, for every model and wrapper. Leaves to others: what follows from it (items of a loss, label
smoothing, metrics, packing).
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from typing import Any

import torch
from torch import nn

from trainwright.interop.loaded import is_peft_model, is_pretrained_model
from trainwright.interop.models import base_model_of, loss_value, undisturbed, unwrapped

logger = logging.getLogger(__name__)

SHIFTING_LOSSES = (None, "ForCausalLM", "ForConditionalGeneration")  # None: `transformers` falls back to the first
_OTHER_TASK = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]")  # BertForTokenClassification
_TOKENS = (1, 1, 0, 1, 1, 0)  # which every vocabulary has; 0 is often padding, of which a model predicts nothing
_TOLERANCE = 1e-6  # of a loss, whose items are the same numbers in the same order


def shifts_labels(model: nn.Module) -> bool:
    """Whether `model` shifts its labels itself: position t predicts label t + 1, so a row's first label is no target.

    Determined from the loss function of a `transformers` model, whatever its class is called. Where that is not visible
    (a user's `forward`, a module that wraps a model, prompts of peft, decoders of older models) a probe of six tokens
    tests which of the labels change the loss, in three forward passes. Where that does not run either, the names of its
    classes decide.
    """
    outer, base = unwrapped(model), base_model_of(model)
    if _is_encoder_decoder(base):
        return False  # its labels are the decoder's output, not its input
    if not _has_prompt(outer):
        outer = base
        if is_pretrained_model(base):
            if "loss_function" in _names_in_forward(base) and "_loss_function" not in vars(base):
                return getattr(base, "loss_type", None) in SHIFTING_LOSSES
            if any(_OTHER_TASK.search(cls.__name__) for cls in _library_classes(base)):
                return False
    shown = _probed(outer) if _can_probe(outer) else None
    return _shifts_by_name(base) if shown is None else shown


def _is_encoder_decoder(base: Any) -> bool:
    config = getattr(base, "config", None)
    parts = (config, getattr(config, "text_config", None))
    return any(getattr(part, "is_encoder_decoder", False) is True for part in parts)


def _has_prompt(model: nn.Module) -> bool:
    """Whether peft puts virtual tokens before a row, the last of which predicts its first label."""
    if not is_peft_model(model):
        return False
    configs = getattr(model, "peft_config", None)
    return isinstance(configs, dict) and any(
        getattr(config, "is_prompt_learning", False) for config in configs.values()
    )


def _names_in_forward(base: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(type(base).forward), "__code__", None)
    return getattr(code, "co_names", ())


def _library_classes(base: Any) -> list[type]:
    return [cls for cls in type(base).__mro__ if cls.__module__.startswith("transformers.models.")]


def _can_probe(model: nn.Module) -> bool:
    """Whether `model` may be called with a row of tokens: a model of `transformers`, or a module with one inside, that
    names `input_ids` and `labels` or takes any keyword. Another module's forward may have side effects.
    """
    if not (is_pretrained_model(base_model_of(model)) or _model_inside(model) is not None):
        return False
    if next((parameter.device.type for parameter in model.parameters()), "meta") == "meta":
        return False
    parameters = inspect.signature(model.forward).parameters
    if {"input_ids", "labels"} <= {*parameters}:
        return True
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _model_inside(model: nn.Module) -> nn.Module | None:
    return next((module for module in model.modules() if module is not model and is_pretrained_model(module)), None)


def _probed(model: nn.Module) -> bool | None:
    """Whether the labels of a row change the loss and its first one does not; None: undetermined."""
    device = next(parameter.device for parameter in model.parameters())
    ids = torch.tensor([_TOKENS], device=device)  # (1, length)
    losses: list[float | None] = []
    try:
        for changed in (slice(0, 0), slice(0, 1), slice(1, None)):
            labels = ids.clone()
            labels[:, changed] = 1 - labels[:, changed]
            inputs = {"input_ids": ids, "labels": labels}
            with undisturbed(model, inputs):
                torch.manual_seed(0)
                losses.append(loss_value(model(**inputs)))
    except Exception as error:  # it needs other inputs, or labels of another shape
        logger.debug("Whether %s shifts its labels cannot be tried: %s", type(model).__name__, error)
        return None
    before, first, others = losses
    if before is None or first is None or others is None:
        return None
    least = _TOLERANCE * abs(before)
    if not abs(others - before) > least:  # NaN, or a head of zeros, for which all labels are equal
        return None
    return abs(first - before) <= least


def _shifts_by_name(base: Any) -> bool:
    mapping = sys.modules.get("transformers.models.auto.modeling_auto")
    known = {*getattr(mapping, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {}).values()} if mapping is not None else set()
    names = [cls.__name__ for cls in type(base).__mro__]
    if any(name in known or name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return True
    if is_pretrained_model(base):
        return any(name.endswith("ForConditionalGeneration") for name in names)
    inside = _model_inside(base)
    return inside is not None and shifts_labels(inside)
