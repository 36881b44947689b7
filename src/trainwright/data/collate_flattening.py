"""A whole batch as one long sequence without padding.

Owns: `DataCollatorWithFlattening`. Leaves to others: attention that honours the borders between samples (the model, by
`position_ids`, `cu_seq_lens_*` or `seq_idx`). Source: `api.json` of both generations, behaviour observed in both.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import torch

from trainwright.data.collate_base import DefaultDataCollator, as_mappings, check_framework, tolist, whole_labels
from trainwright.names import IGNORE_INDEX


class DataCollatorWithFlattening(DefaultDataCollator):
    """Concatenates the samples of a batch; labels of each first token are `separator_id`, so no loss crosses a border.

    `return_position_ids`: positions that start again at `position_ids_start` in every sample, int64 `(1, total)`.
    `return_flash_attn_kwargs`: `cu_seq_lens_q/k` (int32, `num_samples + 1` offsets) and `max_length_q/k` (int).
    `return_seq_idx`: the number of the sample each token belongs to, int32 `(1, total)`.
    A sample without `labels` is its own label.
    """

    def __init__(
        self,
        *args: Any,
        return_position_ids: bool = True,
        separator_id: int = IGNORE_INDEX,
        return_flash_attn_kwargs: bool = False,
        return_seq_idx: bool = False,
        position_ids_start: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.return_position_ids = return_position_ids
        self.separator_id = separator_id
        self.return_flash_attn_kwargs = return_flash_attn_kwargs
        self.return_seq_idx = return_seq_idx
        self.position_ids_start = position_ids_start

    def __call__(
        self, features: Any, return_tensors: str | None = None, separator_id: int | None = None
    ) -> dict[str, Any]:
        framework = check_framework(self.return_tensors if return_tensors is None else return_tensors)
        separator = self.separator_id if separator_id is None else separator_id
        samples = as_mappings(features)
        label_name = "labels" if "labels" in samples[0] else "input_ids"
        ids: list[int] = []
        labels: list[int] = []
        lengths: list[int] = []
        for sample in samples:
            row = tolist(sample["input_ids"])
            ids += row
            labels += [separator, *tolist(sample[label_name])[1:]]
            lengths.append(len(row))

        def row_of(values: list[int], bits: int) -> Any:
            if framework == "pt":
                return torch.tensor([values], dtype=torch.int64 if bits == 64 else torch.int32)  # (1, total)
            return np.array([values], dtype=np.int64 if bits == 64 else np.int32)  # (1, total)

        batch = {"input_ids": row_of(ids, 64), "labels": whole_labels([labels], framework)}
        if self.return_position_ids:
            start = self.position_ids_start
            batch["position_ids"] = row_of([start + place for length in lengths for place in range(length)], 64)
        if self.return_seq_idx:
            batch["seq_idx"] = row_of([number for number, length in enumerate(lengths) for _ in range(length)], 32)
        if self.return_flash_attn_kwargs:
            offsets = row_of([0, *accumulate(lengths)], 32)[0]  # (num_samples + 1,)
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = offsets
            batch["max_length_q"] = batch["max_length_k"] = max(lengths)
        return batch
