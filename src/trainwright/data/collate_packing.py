"""Batches of packs: full sequences, in which every sample keeps its own positions and sees only itself; and batches of
the same samples one by one, for an evaluation.

Owns: `DataCollatorForPacking`, `DataCollatorForUnpacked`. Leaves to others: choosing the samples of a pack (packing),
what a model needs to keep them apart (interop/packed_attention), the mask over pairs of tokens, which is made on the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from trainwright.data.collate_base import Array, to_numpy, warn_of_replaced_labels
from trainwright.names import IGNORE_INDEX, SAMPLE_LENGTHS

TOKENS = ("input_ids", "labels", "attention_mask")
ROWS = ("position_ids", "attention_mask", "seq_idx")
OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "max_seqlen")


class DataCollatorForPacking:
    """Lays packs out as sequences of `packing_length` tokens, or of the longest where a sample is longer. The few
    places that stay free are padded.

    A pack is a list of samples: dicts of `input_ids` and, where they differ, `labels`, arrays `(num_tokens,)`. `names`:
    what a batch holds besides both.

    - `position_ids`, int64: from `first_position` in every sample, and 0 for padding, so that none lies beyond the
      model's table.
    - `attention_mask`, int64: 1 for tokens, 0 for padding.
    - `seq_idx`, int32: number of the sample in its pack, from 0; padding has another number.
    - `cu_seq_lens_q`, `cu_seq_lens_k`, `cu_seqlens`: int32 `(num_samples + 1,)`, offsets of all samples of the batch;
      `max_length_q`, `max_length_k`, `max_seqlen`: int, the longest. With any of them the batch is one row.

    - `sample_lengths`, with `names_lengths`: the lengths of the samples of each pack, without padding, as lists of int.
      The host counts and divides by them without asking a device; they are taken out before the model is called.

    Shapes are `(num_packs, packing_length)`, or `(1, num_packs * packing_length)` where the batch is one row, as
    attention over variable lengths takes it. The label of each sample's first token is -100, so that no token is
    predicted from another sample's; so are padding and tokens equal to `ignored_label`.
    """

    def __init__(
        self,
        packing_length: int,
        names: Iterable[str] = ROWS,
        *,
        pad_token_id: int = 0,
        copies_labels: bool = False,
        ignored_label: int | None = None,
        names_lengths: bool = False,
        first_position: int = 0,
    ) -> None:
        self.packing_length = packing_length
        self.names = tuple(names)
        self.pad_token_id = pad_token_id
        self.copies_labels = copies_labels  # labels are the tokens, even where a sample has others
        self.ignored_label = ignored_label
        self.names_lengths = names_lengths
        self.first_position = first_position
        self.is_one_row = any(name in OFFSETS for name in self.names)

    def __call__(self, packs: list[list[dict[str, Any]]]) -> dict[str, Any]:
        if self.copies_labels and "_has_looked_at_labels" not in vars(self):
            samples = [sample for pack in packs for sample in pack]
            warn_of_replaced_labels(self, samples, "Leave data_collator out: packing then uses the labels of samples.")
        longest = max(sum(len(sample["input_ids"]) for sample in pack) for pack in packs)
        shape = (len(packs), max(self.packing_length, longest))
        tokens = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        numbers = np.zeros(shape, dtype=np.int32)
        sizes: list[int] = []
        for row, pack in enumerate(packs):
            begin = 0
            for number, sample in enumerate(pack):
                ids = sample["input_ids"]
                end = begin + len(ids)
                tokens[row, begin:end] = ids
                labels[row, begin:end] = self._labels(sample)
                labels[row, begin] = IGNORE_INDEX
                positions[row, begin:end] = np.arange(self.first_position, self.first_position + len(ids))
                numbers[row, begin:end] = number
                sizes.append(len(ids))
                begin = end
            mask[row, :begin] = 1
            free = shape[1] - begin
            if free:
                numbers[row, begin:] = len(pack)
                sizes.append(free)
        batch: dict[str, Array] = {"input_ids": tokens, "labels": labels}
        rows: dict[str, Array] = {"position_ids": positions, "attention_mask": mask, "seq_idx": numbers}
        batch.update({name: values for name, values in rows.items() if name in self.names})
        result: dict[str, Any] = {name: self._tensor(values) for name, values in batch.items()}
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))  # (num_samples + 1,)
        for name in OFFSETS:
            if name in self.names:
                result[name] = max(sizes) if name.startswith("max_") else offsets
        if self.names_lengths:
            result[SAMPLE_LENGTHS] = [[len(sample["input_ids"]) for sample in pack] for pack in packs]
        return result

    def _labels(self, sample: dict[str, Any]) -> Array:
        labels: Array = sample["input_ids" if self.copies_labels or "labels" not in sample else "labels"]
        if self.ignored_label is None:
            return labels
        return np.where(labels == self.ignored_label, IGNORE_INDEX, labels)

    def _tensor(self, values: Array) -> torch.Tensor:
        tensor = torch.from_numpy(values)  # (num_packs, packing_length)
        return tensor.reshape(1, -1) if self.is_one_row else tensor


class DataCollatorForUnpacked:
    """Evaluation batches of a run that packs: tokens padded with `pad_token_id`, labels with -100, on the right.

    A sample without `labels` is its own label, as in a pack. The batch holds `input_ids`, `attention_mask` and
    `labels`, int64 `(batch, longest)`. Samples with other columns, or labels that are not one per token, are batched by
    `otherwise`. `names`: what a model that is no `transformers` one takes to keep packed samples apart. It gets that
    here too, each sample as a separate pack, and nothing that it does not take.
    """

    def __init__(
        self,
        otherwise: Callable[[list[Any]], Any],
        pad_token_id: int = 0,
        names: Iterable[str] = (),
        first_position: int = 0,
    ) -> None:
        self.otherwise = otherwise
        self.pad_token_id = pad_token_id
        self.apart = None
        if names:
            self.apart = DataCollatorForPacking(0, names, pad_token_id=pad_token_id, first_position=first_position)

    def __call__(self, features: list[Any]) -> Any:
        if not all(map(_has_tokens_alone, features)):
            return self.otherwise(features)
        if self.apart is not None:
            if self.apart.is_one_row and len(features) > 1:
                raise ValueError(
                    f"The model takes offsets of samples ({[n for n in self.apart.names if n in OFFSETS]}), so that a "
                    "batch is one row, and this evaluation needs a row for each sample. Set "
                    "per_device_eval_batch_size=1."
                )
            columns = {"input_ids", "labels"}
            samples = [{name: to_numpy(s[name]) for name in columns if s.get(name) is not None} for s in features]
            return self.apart([[sample] for sample in samples])
        rows = [to_numpy(sample["input_ids"]) for sample in features]
        shape = (len(rows), max(map(len, rows)))
        tokens = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for number, (sample, row) in enumerate(zip(features, rows)):
            given = sample.get("labels")
            tokens[number, : len(row)], mask[number, : len(row)] = row, 1
            labels[number, : len(row)] = row if given is None else to_numpy(given)
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in batch.items()}  # (batch, longest)


def _has_tokens_alone(sample: Any) -> bool:
    """Whether a sample is a row of tokens that are not padded yet and, perhaps, a label for each."""
    if not isinstance(sample, Mapping) or sample.get("input_ids") is None:
        return False
    if any(value is not None and not isinstance(value, str) for name, value in sample.items() if name not in TOKENS):
        return False
    shapes = {to_numpy(sample[name]).shape for name in TOKENS if sample.get(name) is not None}
    mask = sample.get("attention_mask")
    return len(shapes) == 1 and len(*shapes) == 1 and (mask is None or bool(to_numpy(mask).all()))
