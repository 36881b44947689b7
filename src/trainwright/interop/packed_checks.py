"""Running a model on one small pack, to find out whether it keeps samples apart and gives each the positions that it
has alone, and whether it can do so faster.

Owns: these checks, which run before the first step. Leaves to others: what follows from them (data/packing_from_args,
packed_attention).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from trainwright.interop.models import base_model_of, undisturbed
from trainwright.interop.per_sample_attention import allowed_pairs, switched_layers, watched
from trainwright.loss import loss_of
from trainwright.names import IGNORE_INDEX

logger = logging.getLogger(__name__)

# Tokens that every vocabulary has (see `_tokens`). The two others differ in what they hold, not only in its order, of
# which a mean would not tell.
OTHERS, SAMPLE = ([1, 2, 3, 3, 2], [3, 1, 1, 1, 1]), [2, 3, 1, 3, 2, 1]
SHORTEST_PACK = len(OTHERS[0]) + len(SAMPLE)
LARGEST_CHANGE = 1e-3  # of the largest prediction; of samples that are kept apart, nothing changes but rounding
LARGEST_CHANGE_IN_HALF = 0.05  # in bf16 and fp16 the order of sums alone changes this much of a deep model
WINDOWS = ("sliding_window", "attention_chunk_size")


@torch.no_grad()
def leaks_across_samples(model: nn.Module, make_batch: Callable[[list[list[int]]], Any]) -> bool | None:
    """Whether what a model says of one sample changes with the tokens of the sample before it; None: it cannot be told.

    A `forward` may take `seq_idx` and not honour it, and its samples would silently train on each other. `make_batch`:
    the inputs of a pack of samples, on the model's device. Costs two forward passes of one pack, once, and changes
    nothing: no gradients, evaluation mode, random states and mode restored.
    """
    parameters = inspect.signature(base_model_of(model).forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    was_training, own = model.training, slice(len(OTHERS[0]), SHORTEST_PACK)
    sample, *others = _tokens(model, SAMPLE, *OTHERS)
    found: list[torch.Tensor] = []
    devices = [value.device for value in model.parameters() if value.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            for other in others:
                torch.manual_seed(0)  # for a model that draws in evaluation mode too
                inputs = make_batch([other, sample])
                inputs["labels"][:, : len(other)] = IGNORE_INDEX
                outputs = model(**{name: value for name, value in inputs.items() if takes_any or name in parameters})
                found.append(_said_of(outputs, inputs["input_ids"].shape, own))
        except Exception as error:  # a model that needs other inputs, or another precision: training will tell
            logger.info("Whether packed samples see each other cannot be checked: %s", error)
            return None
        finally:
            model.train(was_training)
    return bool((found[0] - found[1]).abs().max() > LARGEST_CHANGE * found[0].abs().max())


def difference_from_alone(model: nn.Module, make_batch: Callable[[list[list[int]]], Any]) -> str | None:
    """In what a model treats a sample of a pack otherwise than the same sample alone, which it is given without
    positions, as in an evaluation; None where in nothing, or where it cannot be told.

    A model may count positions from another number than 0, or weigh pairs by where they lie in the pack. `make_batch`:
    as for `leaks_across_samples`. Costs two forward passes, once, and changes nothing.
    """
    base: Any = base_model_of(getattr(model, "_orig_mod", model))
    parameters = inspect.signature(base.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    own = slice(len(OTHERS[0]), SHORTEST_PACK)
    sample, other = _tokens(model, SAMPLE, OTHERS[0])
    batch = make_batch([other, sample])
    batch["labels"][:, : len(other)] = IGNORE_INDEX
    batch = {name: value for name, value in batch.items() if takes_any or name in parameters}
    whole = {name: value[:, own] for name, value in batch.items() if name in ("input_ids", "labels")}
    try:
        with undisturbed(model, whole):
            alone = _said_of(model(**whole), whole["input_ids"].shape, slice(None))
    except Exception as error:  # a model that needs other inputs, or another precision: training will tell
        logger.info("Whether a sample is the same in a pack as alone cannot be checked: %s", error)
        return None
    try:
        with undisturbed(model, batch):
            together = _said_of(model(**batch), batch["input_ids"].shape, own)
    except Exception as error:
        return f"runs on a sample alone, but not on a pack ({type(error).__name__}: {error})"
    if together.shape == alone.shape and _is_close(together, alone, base):
        return None
    return "predicts otherwise of a sample in a pack than of the same sample alone"


def _is_close(together: torch.Tensor, alone: torch.Tensor, model: nn.Module) -> bool:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    bound = LARGEST_CHANGE if dtypes <= {torch.float32, torch.float64} else LARGEST_CHANGE_IN_HALF
    return bool((together - alone).abs().max() <= bound * alone.abs().max())


def _tokens(model: nn.Module, *samples: list[int]) -> list[list[int]]:
    """`samples` without the padding token, to which some models give a position of its own."""
    config: Any = getattr(base_model_of(getattr(model, "_orig_mod", model)), "config", None)
    padding, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    other = 4 if isinstance(size, int) and size > 4 else 0
    return [[other if token == padding else token for token in sample] for sample in samples]


def _said_of(outputs: Any, shape: torch.Size, places: slice) -> torch.Tensor:
    """The predictions at `places` of the first row; the loss where a model returns no predictions."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else [outputs]
    for value in values:
        if isinstance(value, torch.Tensor) and value.shape[:2] == shape:
            return value[0, places].float()
    return loss_of(outputs, {}).float()


@torch.no_grad()
def why_not_per_sample(
    model: nn.Module, make_batch: Callable[[list[list[int]]], Any], packing_length: int
) -> str | None:
    """Why the layers of this model, which are switched to it, cannot attend by sample, in words; None where they can.

    They can where, of a sample that is longer than the model's shortest window, each layer looks at exactly the pairs
    of tokens that its rule says, and the model predicts the same of it in a pack. `make_batch`: as for
    `leaks_across_samples`, with borders in place of a mask. Costs two forward passes, once, and changes nothing.
    """
    base: Any = base_model_of(model)
    config, layers = base.config, switched_layers(base)
    if not layers:
        return "its layers do not take their attention from ALL_ATTENTION_FUNCTIONS"
    if getattr(config, "output_attentions", False):
        return "output_attentions=True asks for the weights of all pairs of tokens"
    text = getattr(config, "get_text_config", lambda: config)()
    windows = [getattr(text, name, None) for name in WINDOWS]
    length = max([len(SAMPLE), *(size + 2 for size in windows if isinstance(size, int))])
    length = min(length, packing_length - len(OTHERS[0]))
    sample, other = _tokens(model, (SAMPLE * (length // len(SAMPLE) + 1))[:length], OTHERS[0])
    seen: set[int] = set()
    different: list[str] = []

    def watch(layer: nn.Module, own: str, mask: Any, length: int, is_causal: bool, window: int | None) -> None:
        seen.add(id(layer))
        if not _follows(own, mask, length, is_causal, window):
            different.append(type(layer).__name__)

    places = slice(len(other), len(other) + length)
    try:
        batch = make_batch([other, sample])
        rest = {name: value for name, value in batch.items() if name != "labels"}
        ids = batch["input_ids"]
        with undisturbed(model, rest):
            together = _said_of(model(**rest), ids.shape, places)
        with undisturbed(model, rest), watched(watch):
            alone = _said_of(model(input_ids=ids[:, places]), torch.Size((1, length)), slice(None))
    except Exception as error:  # another shape than that of a mask, other keys than those of the pack ...
        return f"a trial ended in {type(error).__name__}: {error}"
    if different:
        return f"{different[0]} looks at other tokens than its is_causal and sliding_window say"
    if len(seen) < len(layers):
        return f"{len(layers) - len(seen)} of its {len(layers)} layers were not asked"
    if not _is_close(together, alone, base):
        return "a trial gave other predictions for a sample in a pack than alone"
    return None


def _follows(own: str, mask: torch.Tensor | None, length: int, is_causal: bool, window: int | None) -> bool:
    """Whether the mask that a model made for one whole sample says what the rule of a layer says."""
    expected = allowed_pairs([length], is_causal, window)
    if mask is None:  # sdpa then follows `is_causal`; eager attention looks everywhere
        told = allowed_pairs([length], is_causal and own == "sdpa", None)
    elif mask.dtype == torch.bool:
        told = mask.cpu()
    else:
        told = mask.cpu() == 0
        if not bool((told | (mask.cpu() <= torch.finfo(mask.dtype).min / 2)).all()):
            return False  # it also weighs pairs, by their distance for one
    return told.shape[-2:] == expected.shape and bool((told == expected).all())
