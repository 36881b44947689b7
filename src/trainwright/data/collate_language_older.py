"""Language modelling collators that only generation 4 has: whole word masking by "##", and sentence order prediction.

Owns: `DataCollatorForWholeWordMask`, `DataCollatorForSOP`. Leaves to others: masking itself (collate_language).
Source: `api.json` of 4.55; which words are taken follows Devlin et al. 2018 (BERT), whole word masking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainwright.data.collate_base import warn_of_replaced_labels, whole_labels
from trainwright.data.collate_language import MASKED_REMEDY, DataCollatorForLanguageModeling

MAX_MASKED_TOKENS = 512  # per sample


@dataclass
class DataCollatorForWholeWordMask(DataCollatorForLanguageModeling):
    """Masks whole words, which it recognises by the "##" of WordPiece tokens: about `mlm_probability` of the tokens.

    Words are taken in random order while they fit into `max(1, round(seq * mlm_probability))` tokens (512 at most).
    """

    def torch_call(self, examples: Any) -> Any:
        """Batch as torch tensors: `input_ids`, `labels` int64 `(batch, seq)`, and what else the tokenizer pads."""
        self.create_rng()
        warn_of_replaced_labels(self, examples, MASKED_REMEDY)
        rows = [{"input_ids": row} if not isinstance(row, Mapping) else row for row in examples]
        batch, _ = self._pad([{k: v for k, v in row.items() if k not in ("labels", "label")} for row in rows])
        special = self.special_tokens(batch["input_ids"], batch.pop("special_tokens_mask", None))
        chosen = torch.stack([self._choose(row, barred) for row, barred in zip(batch["input_ids"], special)])
        batch["input_ids"], batch["labels"] = self.torch_mask_tokens(batch["input_ids"], chosen)
        return batch

    def _choose(self, row: torch.Tensor, special: torch.Tensor) -> torch.Tensor:
        """The chosen tokens of one sample; `row` int64 `(seq,)`, `special` and the result bool `(seq,)`."""
        words: list[list[int]] = []
        for place, token in enumerate(self.tokenizer.convert_ids_to_tokens(row.tolist())):
            if special[place]:
                continue
            if words and token.startswith("##"):
                words[-1].append(place)
            else:
                words.append([place])
        pad = self.tokenizer.pad_token_id
        num_tokens = len(row) if pad is None else int((row != pad).sum())
        budget = min(MAX_MASKED_TOKENS, max(1, round(num_tokens * float(self.mlm_probability or 0))))
        chosen = torch.zeros_like(special)
        for number in torch.randperm(len(words), generator=self.generator).tolist():
            if len(words[number]) <= budget:
                budget -= len(words[number])
                chosen[words[number]] = True
        return chosen

    def torch_mask_tokens(  # type: ignore[override]
        self, inputs: torch.Tensor, mask_labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace the tokens that `mask_labels` (0 or 1, `(batch, seq)`) marks: `(inputs, labels)`."""
        return self._replace(inputs, mask_labels.bool() & ~self.special_tokens(inputs, None))

    def numpy_mask_tokens(self, inputs: Any, mask_labels: Any) -> tuple[Any, Any]:  # type: ignore[override]
        """As `torch_mask_tokens`, for arrays."""
        masked, labels = self.torch_mask_tokens(torch.as_tensor(inputs), torch.as_tensor(mask_labels))
        return masked.numpy(), labels.numpy()


class DataCollatorForSOP(DataCollatorForLanguageModeling):
    """Masked language modelling with sentence order prediction.

    Samples carry `input_ids`, `token_type_ids` and `sentence_order_label`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def __call__(self, examples: Any, return_tensors: str | None = None) -> Any:
        """What the tokenizer pads, `labels` int64 `(batch, seq)` and `sentence_order_label` int64 `(batch,)`."""
        warn_of_replaced_labels(self, examples, MASKED_REMEDY)
        labels = whole_labels([example["sentence_order_label"] for example in examples], name="sentence_order_label")
        rows = [{name: row[name] for name in ("input_ids", "token_type_ids")} for row in examples]
        batch = super().__call__(rows, return_tensors)
        batch["sentence_order_label"] = labels if isinstance(batch["labels"], torch.Tensor) else labels.numpy()
        return batch

    def mask_tokens(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(inputs, labels, attention_mask)`, all int64 `(batch, seq)`; padding is not attended to."""
        self.create_rng()
        masked, labels = self.torch_mask_tokens(inputs)
        attended = (
            torch.ones_like(inputs) if self.tokenizer.pad_token_id is None else inputs != self.tokenizer.pad_token_id
        )
        return masked, labels, attended.long()
