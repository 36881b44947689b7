"""How a model is told which tokens of a packed sequence belong together.

Owns: what `packing=True` gives to a model, the mask over pairs of tokens, finding a model that cannot be told. Leaves
to others: laying out packs (data/collate_packing).

Source: `position_ids`, `cu_seq_lens_q/k`, `max_length_q/k` and `seq_idx` are the documented inputs of the flattening
collator; that eager attention adds its mask and sdpa also takes one of booleans was observed in both releases.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainwright.interop.loaded import is_pretrained_model
from trainwright.interop.models import base_model_of, shifts_labels
from trainwright.loss import loss_of
from trainwright.names import IGNORE_INDEX

logger = logging.getLogger(__name__)

PER_ROW = ("position_ids", "attention_mask", "seq_idx")
FLASH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
OWN_OFFSETS = ("cu_seqlens", "max_seqlen")
SEPARATORS = ("position_ids", "seq_idx", "cu_seqlens", "cu_seq_lens_q")  # from any of these samples can be told apart

# Tokens that every vocabulary has. The two others differ in what they hold, not only in its order, of which a mean
# would not tell.
OTHERS, SAMPLE = ([1, 2, 3, 3, 2], [3, 1, 1, 1, 1]), [2, 3, 1, 3, 2, 1]
SHORTEST_PACK = len(OTHERS[0]) + len(SAMPLE)
LARGEST_CHANGE = 1e-3  # of the largest prediction; of samples that are kept apart, nothing changes but rounding


@dataclass(frozen=True)
class PackedInputs:
    """What a model gets beside tokens and labels, and what has to be done to a batch on its device (None: nothing)."""

    names: tuple[str, ...]
    prepare: Callable[[Any], Any] | None = None


def packed_inputs(model: nn.Module, packing_length: int) -> PackedInputs:
    """How to keep samples apart in this model. Raises ValueError, with the remedy, for one that cannot.

    `transformers` models that predict the next token: a mask over pairs of tokens for "sdpa" and "eager" attention,
    offsets for flash attention. Any other module: those of `position_ids`, `seq_idx`, `attention_mask` (1 for tokens, 0
    for padding), `cu_seqlens`, `max_seqlen`, `cu_seq_lens_q/k` and `max_length_q/k` that its `forward` names.
    """
    base = base_model_of(getattr(model, "_orig_mod", model))
    name = type(base).__name__
    parameters = inspect.signature(base.forward).parameters
    if not is_pretrained_model(base):
        names = tuple(given for given in (*PER_ROW, *OWN_OFFSETS, *FLASH) if given in parameters)
        if not set(SEPARATORS) & set(names):
            raise ValueError(
                f"packing=True puts several samples into one sequence, and {name}.forward takes none of "
                f"{list(SEPARATORS)} that would tell it where each begins (it takes {list(parameters)}): its samples "
                "would see each other. Add one of these arguments and honour it, or set packing=False."
            )
        return PackedInputs(names)
    if not shifts_labels(base) or "position_ids" not in parameters:
        raise ValueError(
            f"packing=True is for models that predict the next token and take position_ids; {name} is none. Use "
            "train_sampling_strategy='group_by_length', which wastes little on padding with any model."
        )
    config: Any = base.config
    attention = str(getattr(config, "_attn_implementation", "eager") or "eager")
    if "flash" in attention:
        return PackedInputs(("position_ids", *FLASH))
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"packing=True keeps samples apart in attn_implementation 'sdpa', 'eager' and 'flash_attention_2' (or "
            f"another flash kernel), and {name} uses {attention!r}. Load the model with one of these."
        )
    _check_layers(config, name, attention, packing_length)
    additive: Any = None if attention == "sdpa" else base.dtype
    return PackedInputs(PER_ROW, functools.partial(attend_within_samples, dtype=additive))


def _check_layers(config: Any, name: str, attention: str, packing_length: int) -> None:
    """Raise ValueError for layers that a mask over pairs of tokens would not bound, or bound wrongly."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    for window in ("sliding_window", "attention_chunk_size"):
        size = getattr(config, window, None)
        uses_window = getattr(config, "use_sliding_window", True) or window != "sliding_window"
        if isinstance(size, int) and size < packing_length and uses_window:
            kinds.add(f"{window}={size}")
        else:
            kinds -= {"sliding_attention" if window == "sliding_window" else "chunked_attention"}
    if kinds:
        raise ValueError(
            f"packing=True with attn_implementation={attention!r} gives every layer one mask, and {name} has layers of "
            f"another kind ({', '.join(sorted(kinds))}). Load it with attn_implementation='flash_attention_2', where "
            "each layer keeps its own window, or lower packing_length to the window."
        )


def attend_within_samples(inputs: Any, dtype: torch.dtype | None) -> Any:
    """A batch with the mask `(batch, 1, length, length)` of a causal model in place of `seq_idx` `(batch, length)`.

    True, or 0 in `dtype`, where a token may look: at tokens of its own sample up to itself. False, or the lowest value
    of `dtype`, elsewhere. Made on the device of the batch: from a worker it would be `length` times as many bytes
    as the tokens are. A batch without `seq_idx` (evaluation, which is not packed) is returned as it is.
    """
    if "seq_idx" not in inputs:
        return inputs
    rest = {name: value for name, value in inputs.items() if name != "seq_idx"}
    numbers = inputs["seq_idx"]  # (batch, length)
    may_look = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril_()  # (batch, 1, length, length)
    if dtype is None:
        return {**rest, "attention_mask": may_look}
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(may_look.shape, dtype=dtype, device=may_look.device).masked_fill_(
        may_look.logical_not_(), lowest
    )
    return {**rest, "attention_mask": mask}


@torch.no_grad()
def sees_other_samples(model: nn.Module, make_batch: Callable[[list[list[int]]], Any]) -> bool | None:
    """Whether what a model says of one sample changes with the tokens of the sample before it; None: it cannot be told.

    A `forward` may take `seq_idx` and not honour it, and its samples would silently train on each other. `make_batch`:
    the inputs of a pack of samples, on the model's device. Costs two forward passes of one pack, once, and changes
    nothing: no gradients, evaluation mode, random states and mode restored.
    """
    parameters = inspect.signature(base_model_of(model).forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    was_training, own = model.training, slice(len(OTHERS[0]), SHORTEST_PACK)
    found: list[torch.Tensor] = []
    devices = [value.device for value in model.parameters() if value.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            for other in OTHERS:
                torch.manual_seed(0)  # for a model that draws in evaluation mode too
                inputs = make_batch([other, SAMPLE])
                inputs["labels"][:, : len(other)] = IGNORE_INDEX
                outputs = model(**{name: value for name, value in inputs.items() if takes_any or name in parameters})
                found.append(_said_of(outputs, inputs["input_ids"].shape, own))
        except Exception as error:  # a model that needs other inputs, or another precision: training will tell
            logger.info("Whether packed samples see each other cannot be checked: %s", error)
            return None
        finally:
            model.train(was_training)
    return bool((found[0] - found[1]).abs().max() > LARGEST_CHANGE * found[0].abs().max())


def _said_of(outputs: Any, shape: torch.Size, places: slice) -> torch.Tensor:
    """The predictions at `places` of the first row; the loss where a model returns no predictions."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else [outputs]
    for value in values:
        if isinstance(value, torch.Tensor) and value.shape[:2] == shape:
            return value[0, places].float()
    return loss_of(outputs, {}).float()
