"""Batches of sequences that are padded to a common length by the tokenizer, and labels padded along with them.

Owns: padding of inputs and labels. Leaves to others: what a pad token is (the tokenizer). Any object with `.pad`,
`.pad_token_id` and `.padding_side` works as tokenizer.
Source: `api.json` of both generations (names, fields, defaults).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from trainwright.data.collate_base import (
    Array,
    DataCollatorMixin,
    check_framework,
    refuse_tensorflow,
    tolist,
    whole_labels,
)
from trainwright.names import IGNORE_INDEX


def pad_without_fast_tokenizer_warning(tokenizer: Any, *pad_args: Any, **pad_kwargs: Any) -> Any:
    """`tokenizer.pad(...)`, without the advice that padding while tokenising is faster: a collator cannot follow it."""
    given = getattr(tokenizer, "deprecation_warnings", None)
    if not isinstance(given, dict):
        return tokenizer.pad(*pad_args, **pad_kwargs)
    key = "Asking-to-pad-a-fast-tokenizer"
    before = given.get(key, False)
    given[key] = True
    try:
        return tokenizer.pad(*pad_args, **pad_kwargs)
    finally:
        given[key] = before


def round_up(length: int, multiple: int | None) -> int:
    """`length`, raised to the next multiple of `multiple` (None: unchanged)."""
    return -(-length // multiple) * multiple if multiple else length


def pad_rows(rows: Sequence[Any], value: int, side: str, length: int) -> list[list[int]]:
    """Each row as a list of `length` ids, filled up with `value` on `side` ("left" or "right")."""
    padded = []
    for row in map(tolist, rows):
        filler = [value] * (length - len(row))
        padded.append(filler + row if side == "left" else row + filler)
    return padded


def _collate_rows(examples: Sequence[Any], tokenizer: Any, pad_to_multiple_of: int | None) -> list[list[int]]:
    lengths = [len(example) for example in examples]
    length = round_up(max(lengths), pad_to_multiple_of)
    if min(lengths) == length:
        return [tolist(example) for example in examples]
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"Samples of {min(lengths)} to {max(lengths)} tokens have to be padded to {length}, but the tokenizer "
            f"({type(tokenizer).__name__}) has no pad token. Set one: tokenizer.pad_token = tokenizer.eos_token."
        )
    return pad_rows(examples, tokenizer.pad_token_id, getattr(tokenizer, "padding_side", "right"), length)


def _torch_collate_batch(
    examples: Sequence[Any], tokenizer: Any, pad_to_multiple_of: int | None = None
) -> torch.Tensor:
    """Lists of token ids as one int64 tensor, padded where lengths differ."""
    return torch.tensor(_collate_rows(examples, tokenizer, pad_to_multiple_of), dtype=torch.int64)  # (batch, seq)


def _numpy_collate_batch(examples: Sequence[Any], tokenizer: Any, pad_to_multiple_of: int | None = None) -> Array:
    """Lists of token ids as one int64 array, padded where lengths differ."""
    return np.array(_collate_rows(examples, tokenizer, pad_to_multiple_of), dtype=np.int64)  # (batch, seq)


def _tf_collate_batch(examples: Sequence[Any], tokenizer: Any, pad_to_multiple_of: int | None = None) -> Any:
    """Present because older scripts import it; raises."""
    refuse_tensorflow()


def _label_name(features: Sequence[Mapping[str, Any]]) -> str:
    return "label" if "label" in features[0] else "labels"


def _without(features: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in feature.items() if key != name} for feature in features]


@dataclass
class DataCollatorWithPadding:
    """Pads what the tokenizer knows how to pad; `label` and `label_ids` become `labels`.

    `padding`: True or "longest" (to the longest sample), "max_length" (to `max_length`), False (not at all).
    """

    tokenizer: Any
    padding: Any = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        batch = pad_without_fast_tokenizer_warning(
            self.tokenizer,
            features,
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=check_framework(self.return_tensors),
        )
        for name in ("label", "label_ids"):
            if name in batch:
                batch["labels"] = batch.pop(name)
        return batch


@dataclass
class DataCollatorForTokenClassification(DataCollatorMixin):
    """Pads inputs, and one label per token with `label_pad_token_id`, to the same length and on the same side."""

    tokenizer: Any
    padding: Any = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = IGNORE_INDEX
    return_tensors: str = "pt"

    def torch_call(self, features: list[dict[str, Any]]) -> Any:
        """Batch as torch tensors; `labels` int64 `(batch, seq)`."""
        return self._pad(features, "pt")

    def numpy_call(self, features: list[dict[str, Any]]) -> Any:
        """Batch as NumPy arrays; `labels` int64 `(batch, seq)`."""
        return self._pad(features, "np")

    def _pad(self, features: list[dict[str, Any]], framework: str) -> Any:
        name = _label_name(features)
        batch = pad_without_fast_tokenizer_warning(
            self.tokenizer,
            _without(features, name),
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=framework,
        )
        if name in features[0]:
            seq = batch["input_ids"].shape[1]
            labels = [feature[name] for feature in features]
            batch[name] = whole_labels(
                pad_rows(labels, self.label_pad_token_id, self.tokenizer.padding_side, seq), framework
            )
        return batch


@dataclass
class DataCollatorForSeq2Seq:
    """Pads inputs and target sequences, each to its own length.

    With a `model` that has `prepare_decoder_input_ids_from_labels`, the batch also carries `decoder_input_ids`, which
    label smoothing needs because it takes the labels away from the model.
    """

    tokenizer: Any
    model: Any | None = None
    padding: Any = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = IGNORE_INDEX
    return_tensors: str = "pt"

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        framework = check_framework(self.return_tensors if return_tensors is None else return_tensors)
        name = _label_name(features)
        labels = [feature[name] for feature in features if feature.get(name) is not None]
        batch = pad_without_fast_tokenizer_warning(
            self.tokenizer,
            _without(features, name),
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=framework,
        )
        batch["labels"] = whole_labels(self._pad_labels(labels), framework) if labels else None  # (batch, target_seq)
        shift_labels = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if labels and shift_labels is not None:
            batch["decoder_input_ids"] = shift_labels(labels=batch["labels"])  # (batch, target_seq)
        return batch

    def _pad_labels(self, labels: list[Any]) -> list[Any]:
        strategy = getattr(self.padding, "value", self.padding)  # PaddingStrategy members carry their name as value
        if strategy in (False, "do_not_pad"):
            return [tolist(row) for row in labels]
        length = max(len(row) for row in labels)
        if strategy == "max_length" and self.max_length is not None:
            length = max(length, self.max_length)
        length = round_up(length, self.pad_to_multiple_of)
        return pad_rows(labels, self.label_pad_token_id, self.tokenizer.padding_side, length)


@dataclass
class DataCollatorForMultipleChoice(DataCollatorMixin):
    """Samples with one row per choice, padded to a common length: inputs `(batch, choices, seq)`, labels `(batch,)`."""

    tokenizer: Any
    padding: Any = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch as torch tensors."""
        return self._pad(examples, "pt")

    def numpy_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch as NumPy arrays."""
        return self._pad(examples, "np")

    def _pad(self, examples: list[dict[str, Any]], framework: str) -> dict[str, Any]:
        name = _label_name(examples)
        num_choices = len(examples[0]["input_ids"])
        rows = chain.from_iterable(
            [{key: value[choice] for key, value in example.items()} for choice in range(num_choices)]
            for example in _without(examples, name)
        )
        padded = pad_without_fast_tokenizer_warning(
            self.tokenizer,
            list(rows),
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=framework,
        )
        batch = {key: value.reshape(len(examples), num_choices, -1) for key, value in padded.items()}
        if name in examples[0]:
            batch["labels"] = whole_labels([example[name] for example in examples], framework)  # (batch,)
        return batch
