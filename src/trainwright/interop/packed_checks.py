"""Probes a model with one small pack: whether it separates samples, gives each the positions that it has alone, and
can attend by sample.

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
from trainwright.interop.per_sample_attention import allowed_pairs, observed, switched_layers
from trainwright.loss import loss_of
from trainwright.names import IGNORE_INDEX

logger = logging.getLogger(__name__)

# Tokens that every vocabulary has (see `_tokens`). The two others differ in content, not only in order, which a mean
# would not show.
OTHERS, SAMPLE = ([1, 2, 3, 3, 2], [3, 1, 1, 1, 1]), [2, 3, 1, 3, 2, 1]
SHORTEST_PACK = len(OTHERS[0]) + len(SAMPLE)
LARGEST_CHANGE = 1e-3  # of the largest prediction; between separated samples only rounding differs
LARGEST_CHANGE_IN_HALF = 0.05  # in bf16 and fp16 the order of sums alone changes predictions of a deep model this much
WINDOWS = ("sliding_window", "attention_chunk_size")


@torch.no_grad()
def leaks_across_samples(model: nn.Module, make_batch: Callable[[list[list[int]]], Any]) -> bool | None:
    """Whether predictions for one sample change with the tokens of the sample before it; None: undetermined.

    A `forward` may take `seq_idx` and ignore it, and its samples would silently train on each other. `make_batch`: the
    inputs of a pack of samples, on the model's device. Costs two forward passes of one pack, once, without side
    effects.
    """
    parameters = inspect.signature(base_model_of(model).forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    was_training, positions = model.training, slice(len(OTHERS[0]), SHORTEST_PACK)
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
                found.append(_predictions(outputs, inputs["input_ids"].shape, positions))
        except Exception as error:  # a model that needs other inputs or another precision: training will show it
            logger.info("Whether packed samples see each other cannot be checked: %s", error)
            return None
        finally:
            model.train(was_training)
    return bool((found[0] - found[1]).abs().max() > LARGEST_CHANGE * found[0].abs().max())


def difference_from_alone(model: nn.Module, make_batch: Callable[[list[list[int]]], Any]) -> str | None:
    """How predictions for a sample of a pack differ from those for the same sample alone, which gets no positions, as
    in
    an evaluation; None where they do not, or where it is undetermined.

    A model may count positions from another number than 0, or weigh pairs by their place in the pack. `make_batch`: as
    for `leaks_across_samples`. Costs two forward passes, once, without side effects.
    """
    base: Any = base_model_of(getattr(model, "_orig_mod", model))
    parameters = inspect.signature(base.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    positions = slice(len(OTHERS[0]), SHORTEST_PACK)
    sample, other = _tokens(model, SAMPLE, OTHERS[0])
    batch = make_batch([other, sample])
    batch["labels"][:, : len(other)] = IGNORE_INDEX
    batch = {name: value for name, value in batch.items() if takes_any or name in parameters}
    whole = {name: value[:, positions] for name, value in batch.items() if name in ("input_ids", "labels")}
    try:
        with undisturbed(model, whole):
            alone = _predictions(model(**whole), whole["input_ids"].shape, slice(None))
    except Exception as error:  # a model that needs other inputs or another precision: training will show it
        logger.info("Whether a sample is the same in a pack as alone cannot be checked: %s", error)
        return None
    try:
        with undisturbed(model, batch):
            together = _predictions(model(**batch), batch["input_ids"].shape, positions)
    except Exception as error:
        return f"runs on a sample alone, but not on a pack ({type(error).__name__}: {error})"
    if together.shape == alone.shape and _is_close(together, alone, base):
        return None
    return "predicts differently for a sample in a pack than for the same sample alone"


def loss_is_no_mean(model: nn.Module, make_batch: Callable[[list[list[list[int]]]], Any]) -> bool:
    """Whether the loss of packs is another than the mean over their labels, each weighing the same, or cannot be had.

    A module may average the rows of a batch, and a router adds a term for all tokens of it. `make_batch`: the inputs of
    packs, each a list of samples. Costs four forward passes of small packs, once, without side effects.
    """
    base: Any = base_model_of(getattr(model, "_orig_mod", model))
    parameters = inspect.signature(base.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    sample, other = _tokens(model, SAMPLE, OTHERS[0])
    losses, counts = [], []
    for packs in ([[other]], [[sample]], [[other, sample]], [[other], [sample]]):
        try:
            batch = {name: value for name, value in make_batch(packs).items() if takes_any or name in parameters}
            with undisturbed(model, batch):
                losses.append(loss_of(model(**batch), batch).float().mean())
            counts.append(int((batch["labels"] != IGNORE_INDEX).sum()))
        except Exception as error:  # a model that needs other inputs or another precision
            logger.info("Whether the loss of a pack is a mean over its labels cannot be checked: %s", error)
            return True
    mean = (losses[0] * counts[0] + losses[1] * counts[1]) / (counts[0] + counts[1])
    return not all(_is_close(loss, mean, base) for loss in losses[2:])


def _is_close(together: torch.Tensor, alone: torch.Tensor, model: nn.Module) -> bool:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    bound = LARGEST_CHANGE if dtypes <= {torch.float32, torch.float64} else LARGEST_CHANGE_IN_HALF
    return bool((together - alone).abs().max() <= bound * alone.abs().max())


def _tokens(model: nn.Module, *samples: list[int]) -> list[list[int]]:
    """`samples` without the padding token, for which some models have a separate position."""
    config: Any = getattr(base_model_of(getattr(model, "_orig_mod", model)), "config", None)
    padding, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    other = 4 if isinstance(size, int) and size > 4 else 0
    return [[other if token == padding else token for token in sample] for sample in samples]


def _predictions(outputs: Any, shape: torch.Size, places: slice) -> torch.Tensor:
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
    """Why the switched layers of this model cannot attend by sample, in words; None where they can.

    They can where, for a sample longer than the model's shortest window, each layer attends to exactly the pairs of its
    rule, and the model predicts the same for it in a pack. `make_batch`: as for `leaks_across_samples`, with boundaries
    in place of a mask. Costs two forward passes, once, without side effects.
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
    called: set[int] = set()
    different: list[str] = []

    def observe(
        layer: nn.Module, implementation: str, mask: Any, length: int, is_causal: bool, window: int | None
    ) -> None:
        called.add(id(layer))
        if not _follows(implementation, mask, length, is_causal, window):
            different.append(type(layer).__name__)

    places = slice(len(other), len(other) + length)
    try:
        batch = make_batch([other, sample])
        rest = {name: value for name, value in batch.items() if name != "labels"}
        ids = batch["input_ids"]
        with undisturbed(model, rest):
            together = _predictions(model(**rest), ids.shape, places)
        with undisturbed(model, rest), observed(observe):
            alone = _predictions(model(input_ids=ids[:, places]), torch.Size((1, length)), slice(None))
    except Exception as error:  # another shape than that of a mask, other keys than those of the pack ...
        return f"a trial ended in {type(error).__name__}: {error}"
    if different:
        return f"{different[0]} attends to other tokens than its is_causal and sliding_window say"
    if len(called) < len(layers):
        return f"{len(layers) - len(called)} of its {len(layers)} layers were not called"
    if not _is_close(together, alone, base):
        return "a trial gave other predictions for a sample in a pack than alone"
    return None


def _follows(implementation: str, mask: torch.Tensor | None, length: int, is_causal: bool, window: int | None) -> bool:
    """Whether the mask that a model made for one whole sample agrees with the rule of a layer."""
    expected = allowed_pairs([length], is_causal, window)
    if mask is None:  # sdpa then follows `is_causal`; eager attention attends everywhere
        pairs = allowed_pairs([length], is_causal and implementation == "sdpa", None)
    elif mask.dtype == torch.bool:
        pairs = mask.cpu()
    else:
        pairs = mask.cpu() == 0
        if not bool((pairs | (mask.cpu() <= torch.finfo(mask.dtype).min / 2)).all()):
            return False  # it also weighs pairs, by their distance for one
    return pairs.shape[-2:] == expected.shape and bool((pairs == expected).all())
