"""Batches for language modelling: masked (tokens or whole words) and causal.

Owns: which tokens are masked, and with what. Leaves to others: padding (collate_padding), permutation language
modelling (collate_permutation), the collators that only generation 4 has (collate_language_older).
Source: `api.json` of both generations; draws from torch's generator in the order that both installed releases were seen
to draw, so equal seeds mask equal tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import get_worker_info

from trainwright.data.collate_base import DataCollatorMixin, refuse_tensorflow, to_numpy, warn_of_replaced_labels
from trainwright.data.collate_padding import _torch_collate_batch, pad_rows, pad_without_fast_tokenizer_warning
from trainwright.names import IGNORE_INDEX

CAUSAL_REMEDY = (
    "Tokens that they exclude (a prompt, as -100) are trained on. DataCollatorForSeq2Seq(tokenizer) pads the labels "
    "that samples have; packing=True without a data_collator uses them too."
)
MASKED_REMEDY = "Remove that column, or use DataCollatorForTokenClassification(tokenizer), which pads them."


@dataclass
class DataCollatorForLanguageModeling(DataCollatorMixin):
    """Pads samples of token ids and makes the labels of masked (`mlm=True`) or causal (`mlm=False`) language modelling.

    A chosen token becomes the mask token with probability `mask_replace_prob`, a random one with `random_replace_prob`,
    and stays as it is otherwise; labels of all other tokens are -100. In causal modelling labels are the inputs with
    padding at -100.

    `whole_word_mask` chooses words instead of tokens; samples then carry `offset_mapping`, and chosen words are always
    replaced by masks unless the replacement probabilities were changed. `seed` draws from a generator of the
    collator (one per loader worker) instead of torch's global one. `tf_experimental_compile` is there for older calls
    and must be False.
    """

    tokenizer: Any
    mlm: bool = True
    whole_word_mask: bool = False
    mlm_probability: float | None = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    seed: int | None = None
    tf_experimental_compile: bool = False

    def __post_init__(self) -> None:
        self.generator: torch.Generator | None = None  # None: torch's global one
        self._generator_owner: int | None = None  # the loader worker it was made for; None: the main process
        if self.tf_experimental_compile:
            refuse_tensorflow()
        if not self.mlm:
            if self.whole_word_mask:
                raise ValueError("whole_word_mask=True masks words, which needs mlm=True.")
            return
        if getattr(self.tokenizer, "mask_token", None) is None:
            raise ValueError(
                "Masked language modelling needs a mask token, and the tokenizer "
                f"({type(self.tokenizer).__name__}) has none. For causal language modelling pass mlm=False."
            )
        for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob"):
            value = getattr(self, name)
            if value is None or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} is not a probability: it must lie between 0 and 1.")
        if self.whole_word_mask and (self.mask_replace_prob, self.random_replace_prob) == (0.8, 0.1):
            self.mask_replace_prob, self.random_replace_prob = 1.0, 0.0
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError(
                f"mask_replace_prob={self.mask_replace_prob} and random_replace_prob={self.random_replace_prob} must "
                "not exceed 1 together: a chosen token is masked, replaced or kept."
            )

    def get_generator(self, seed: int) -> torch.Generator:
        """A torch generator that starts from `seed`."""
        return torch.Generator().manual_seed(seed)

    def create_rng(self) -> None:
        """Give this process its generator: `seed` in the main process, `seed + worker id` in a loader worker."""
        worker = get_worker_info()
        if self.seed is None or (self.generator is not None and (worker is None or self._generator_owner == worker.id)):
            return
        self.generator = self.get_generator(self.seed + (0 if worker is None else worker.id))
        self._generator_owner = None if worker is None else worker.id

    def torch_call(self, examples: Any) -> Any:
        """Batch as torch tensors: `input_ids`, `labels` int64 `(batch, seq)`, and what else the tokenizer pads."""
        self.create_rng()
        warn_of_replaced_labels(self, examples, MASKED_REMEDY if self.mlm else CAUSAL_REMEDY)
        batch, offsets = self._pad(examples)
        special_tokens_mask = batch.pop("special_tokens_mask", None)
        if self.mlm:
            batch["input_ids"], batch["labels"] = self.torch_mask_tokens(
                batch["input_ids"], special_tokens_mask, **({} if offsets is None else {"offset_mapping": offsets})
            )
        else:
            labels = batch["input_ids"].clone()
            if self.tokenizer.pad_token_id is not None:
                labels[labels == self.tokenizer.pad_token_id] = IGNORE_INDEX
            batch["labels"] = labels
        return batch

    def numpy_call(self, examples: Any) -> Any:
        """As `torch_call`, in NumPy arrays; draws from the same torch generator."""
        batch = self.torch_call(examples)
        for name, value in batch.items():
            batch[name] = to_numpy(value)
        return batch

    def _pad(self, examples: Any) -> tuple[Any, torch.Tensor | None]:
        """The padded batch, and its offsets `(batch, seq, 2)` where the samples carry some."""
        if not isinstance(examples[0], Mapping):
            return {"input_ids": _torch_collate_batch(examples, self.tokenizer, self.pad_to_multiple_of)}, None
        offsets = [example["offset_mapping"] for example in examples if "offset_mapping" in example]
        batch = pad_without_fast_tokenizer_warning(
            self.tokenizer,
            # Tokenizers cannot pad offsets of different lengths, so these are padded here.
            [{name: value for name, value in example.items() if name != "offset_mapping"} for example in examples],
            return_tensors="pt",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        if not offsets:
            return batch, None
        seq, side = batch["input_ids"].shape[1], getattr(self.tokenizer, "padding_side", "right")
        edges = [pad_rows([[pair[edge] for pair in row] for row in offsets], 0, side, seq) for edge in (0, 1)]
        return batch, torch.tensor(edges).permute(1, 2, 0)  # (batch, seq, 2)

    def special_tokens(self, inputs: torch.Tensor, given: Any | None) -> torch.Tensor:
        """Which tokens are never masked, bool `(batch, seq)`: as `given`, else by the tokenizer's special ids."""
        if given is not None:
            return torch.as_tensor(given).bool()
        return torch.isin(inputs, torch.tensor(self.tokenizer.all_special_ids, dtype=inputs.dtype))

    def torch_mask_tokens(
        self, inputs: torch.Tensor, special_tokens_mask: Any | None = None, offset_mapping: Any | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose tokens (or words) and replace them: `(inputs, labels)`, both int64 `(batch, seq)`."""
        assert self.mlm_probability is not None
        special = self.special_tokens(inputs, special_tokens_mask)  # (batch, seq)
        barred = special
        if self.whole_word_mask:
            if offset_mapping is None:
                raise ValueError(
                    "whole_word_mask=True finds words by offset_mapping, which the samples lack. Tokenise with "
                    "return_offsets_mapping=True and keep the column with remove_unused_columns=False."
                )
            starts = word_starts(torch.as_tensor(offset_mapping), special)  # (batch, seq)
            barred = ~starts
        probabilities = torch.full(inputs.shape, float(self.mlm_probability)).masked_fill_(barred, 0.0)
        chosen = torch.bernoulli(probabilities, generator=self.generator).bool()  # (batch, seq)
        if self.whole_word_mask:
            chosen = spread_over_words(chosen, starts) & ~special
        return self._replace(inputs, chosen)

    def numpy_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any | None = None, offset_mapping: Any | None = None
    ) -> tuple[Any, Any]:
        """As `torch_mask_tokens`, for arrays."""
        masked, labels = self.torch_mask_tokens(torch.as_tensor(inputs), special_tokens_mask, offset_mapping)
        return masked.numpy(), labels.numpy()

    def _replace(self, inputs: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace the chosen tokens and label them; `chosen` is bool `(batch, seq)`."""
        labels = inputs.masked_fill(~chosen, IGNORE_INDEX)
        mask = torch.full(inputs.shape, float(self.mask_replace_prob))
        masked = torch.bernoulli(mask, generator=self.generator).bool() & chosen
        inputs = inputs.masked_fill(masked, self.tokenizer.mask_token_id)
        if self.mask_replace_prob == 1 or self.random_replace_prob == 0:
            return inputs, labels
        # Of the tokens that were not masked, this share is replaced, so that of all chosen ones random_replace_prob is.
        share = torch.full(inputs.shape, self.random_replace_prob / (1 - self.mask_replace_prob))
        random = torch.bernoulli(share, generator=self.generator).bool() & chosen & ~masked
        words = torch.randint(len(self.tokenizer), inputs.shape, dtype=inputs.dtype, generator=self.generator)
        return torch.where(random, words, inputs), labels


def word_starts(offsets: torch.Tensor, special: torch.Tensor) -> torch.Tensor:
    """Tokens that begin a word: those that do not continue where the token before ended. bool `(batch, seq)`.

    `offsets` int `(batch, seq, 2)` holds the characters each token covers; `special` bool `(batch, seq)`.
    """
    continues = torch.zeros_like(special)
    continues[:, 1:] = (offsets[:, 1:, 0] == offsets[:, :-1, 1]) & ~special[:, :-1]
    return ~continues & ~special


def spread_over_words(chosen: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Each token takes over whether the start of its word was chosen. All bool `(batch, seq)`."""
    places = torch.arange(starts.shape[1]).expand_as(starts)
    word_start = places.masked_fill(~starts, 0).cummax(dim=1).values  # (batch, seq)
    return chosen.gather(1, word_start)
