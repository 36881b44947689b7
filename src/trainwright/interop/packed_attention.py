"""The inputs by which a model separates the samples of a packed sequence.

Owns: the inputs that `packing=True` adds, the block-diagonal mask. Leaves to others: laying out packs
(data/collate_packing), attention by sample (per_sample_attention), probing a model (packed_checks).

Source: `position_ids`, `cu_seq_lens_q/k`, `max_length_q/k` and `seq_idx` are the documented inputs of the flattening
collator; that eager attention adds its mask and sdpa also takes one of booleans was observed in both releases.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from trainwright.interop.label_shift import shifts_labels
from trainwright.interop.loaded import is_pretrained_model
from trainwright.interop.models import base_model_of
from trainwright.interop.packed_checks import SHORTEST_PACK, difference_from_alone, why_not_per_sample
from trainwright.interop.per_sample_attention import borders, per_sample_attention
from trainwright.names import SAMPLE_LENGTHS

logger = logging.getLogger(__name__)

PER_ROW = ("position_ids", "attention_mask", "seq_idx")
FLASH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
OWN_OFFSETS = ("cu_seqlens", "max_seqlen")
SEPARATORS = ("position_ids", "seq_idx", "cu_seqlens", "cu_seq_lens_q")  # any of these separates samples
TOO_SHORT = f"packing_length is below {SHORTEST_PACK}, too short to try it"


class PackedInputs:
    """The inputs of a model in addition to tokens and labels (`names`), and the conversion of a batch on its device
    (a call).

    `is_masked`: a `transformers` model with "sdpa" or "eager" attention. In training its layers get sample boundaries
    and attend by sample where `choose` found that they can. Else it gets a block-diagonal mask: of booleans, or 0 and
    the lowest value of `dtype`. `refusal`: why no such mask is correct, where none is.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        *,
        is_masked: bool = False,
        dtype: torch.dtype | None = None,
        refusal: str | None = None,
    ) -> None:
        self.names = names
        self._is_masked, self._dtype, self._refusal = is_masked, dtype, refusal
        self._divides = self._can_divide = False
        self.loss_is_mean: bool | None = None  # over the labels of a pack, in a trial; None: not tried

    def __call__(self, inputs: Any) -> Any:
        """A batch as the model takes it. A batch without `seq_idx` (of an evaluation that needs rows) is unchanged."""
        if SAMPLE_LENGTHS not in inputs and not (self._is_masked and "seq_idx" in inputs):
            return inputs
        rest = {name: value for name, value in inputs.items() if name != SAMPLE_LENGTHS}
        if not self._is_masked:
            return rest
        numbers = rest.pop("seq_idx")  # (packs, length)
        if self._divides:
            rest["attention_mask"] = borders(numbers, inputs.get(SAMPLE_LENGTHS))
        elif self._refusal is not None:
            raise ValueError(self._refusal)
        else:
            rest["attention_mask"] = mask_within_samples(numbers, self._dtype)
        return rest

    def choose(self, model: nn.Module, make_batch: Callable[[list[list[int]]], Any], packing_length: int) -> None:
        """Probe whether the layers of a model can attend by sample, and log the result. Raises ValueError where they
        cannot and a mask cannot replace it. `make_batch`: the inputs of a pack of samples, on the model's device.
        """
        if not self._is_masked:
            return
        name = type(base_model_of(model)).__name__
        reason: str | None = TOO_SHORT
        if packing_length >= SHORTEST_PACK:
            with self._dividing(model):
                reason = why_not_per_sample(model, make_batch, packing_length)
        self._can_divide = reason is None
        if reason is None:
            logger.info("packing: the layers of %s attend within each sample by itself.", name)
        elif self._refusal is not None:
            raise ValueError(f"{self._refusal} (Its layers cannot attend within each sample by itself: {reason}.)")
        else:
            logger.warning(
                "packing: %s computes attention over whole packs, under a mask, which takes longer than within each "
                "sample by itself. That was not possible: %s.",
                name,
                reason,
            )

    def check_equal_to_alone(self, model: nn.Module, make_batch: Callable[[list[list[int]]], Any]) -> None:
        """Raise ValueError where a `transformers` model predicts differently for a sample in a pack than alone; warn
        for another module. `choose` has checked it where layers attend by sample.
        """
        difference = None if self._can_divide else difference_from_alone(model, make_batch)
        if difference is None:
            return
        base = base_model_of(getattr(model, "_orig_mod", model))
        text = f"packing=True: {type(base).__name__} {difference}."
        if is_pretrained_model(base):
            raise ValueError(
                f"{text} Its training would not be that of the unpacked samples. Use "
                "train_sampling_strategy='group_by_length', which wastes little on padding with any model."
            )
        logger.warning("%s Where it is used without positions, it will differ from training.", text)

    @contextlib.contextmanager
    def while_packed(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model is switched as `choose` decided; after it, it is restored."""
        with self._dividing(model) if self._can_divide else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _dividing(self, model: nn.Module) -> Iterator[None]:
        divided, self._divides = self._divides, True  # already in an evaluation within training
        try:
            with per_sample_attention(model):
                yield
        finally:
            self._divides = divided


def first_position(model: nn.Module) -> int:
    """The position of a sample's first token: 0, or the one after the padding token's where the position table has one
    for it, as in RoBERTa."""
    for name, module in base_model_of(getattr(model, "_orig_mod", model)).named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def packed_inputs(model: nn.Module, packing_length: int) -> PackedInputs:
    """How this model separates packed samples. Raises ValueError, with the remedy, for one that cannot.

    `transformers` models that predict the next token: borders or a mask over pairs of tokens for "sdpa" and "eager"
    attention, offsets for flash attention. Any other module: those of `position_ids`, `seq_idx`, `attention_mask` (1
    for tokens, 0 for padding), `cu_seqlens`, `max_seqlen`, `cu_seq_lens_q/k` and `max_length_q/k` that its `forward`
    names.
    """
    base = base_model_of(model)
    name = type(base).__name__
    parameters = inspect.signature(base.forward).parameters
    if not is_pretrained_model(base):
        names = tuple(given for given in (*PER_ROW, *OWN_OFFSETS, *FLASH) if given in parameters)
        if not set(SEPARATORS) & set(names):
            raise ValueError(
                f"packing=True puts several samples into one sequence, and {name}.forward takes none of "
                f"{list(SEPARATORS)} that would tell it where each begins (it takes {list(parameters)}): its samples "
                "would see each other. Add one of these arguments and use it, or set packing=False."
            )
        return PackedInputs(names)
    config: Any = base.config
    lack = (
        "it is not known to predict the next token"
        if not shifts_labels(base)
        else f"the forward of {name} takes none"
        if "position_ids" not in parameters
        else "its alibi=True weighs pairs of tokens by their distance in the whole row"
        if getattr(config, "alibi", False)
        else None
    )
    if lack is not None:
        raise ValueError(
            f"packing=True is for models that predict the next token and take position_ids; {name} cannot be packed: "
            f"{lack}. Use train_sampling_strategy='group_by_length', which wastes little on padding with any model."
        )
    attention = str(getattr(config, "_attn_implementation", "eager") or "eager")
    if "flash" in attention:
        return PackedInputs(("position_ids", *FLASH))
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"packing=True keeps samples apart in attn_implementation 'sdpa', 'eager' and 'flash_attention_2' (or "
            f"another flash kernel), and {name} uses {attention!r}. Load the model with one of these."
        )
    additive: Any = None if attention == "sdpa" else base.dtype
    refusal = _why_no_mask(config, name, attention, packing_length)
    return PackedInputs(PER_ROW, is_masked=True, dtype=additive, refusal=refusal)


def _why_no_mask(config: Any, name: str, attention: str, packing_length: int) -> str | None:
    """Message about layers for which one block-diagonal mask is not enough or wrong; None: there are none."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    for window in ("sliding_window", "attention_chunk_size"):
        size = getattr(config, window, None)
        uses_window = getattr(config, "use_sliding_window", True) or window != "sliding_window"
        if isinstance(size, int) and size < packing_length and uses_window:
            kinds.add(f"{window}={size}")
        else:
            kinds -= {"sliding_attention" if window == "sliding_window" else "chunked_attention"}
    if not kinds:
        return None
    return (
        f"packing=True with attn_implementation={attention!r} gives every layer one mask, and {name} has layers of "
        f"another kind ({', '.join(sorted(kinds))}). Load it with attn_implementation='flash_attention_2', where "
        "each layer keeps its own window, or lower packing_length to the window."
    )


def mask_within_samples(numbers: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The mask `(packs, 1, length, length)` of a causal model for sample indices `numbers` `(packs, length)`.

    True, or 0 in `dtype`, where a token attends: to tokens of its sample up to itself. False, or the lowest value of
    `dtype`, elsewhere. Made on the device of the batch: a worker would have to send `length` times the bytes of the
    tokens.
    """
    attends = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril_()
    if dtype is None:
        return attends
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
    return mask.masked_fill_(attends.logical_not_(), lowest)
