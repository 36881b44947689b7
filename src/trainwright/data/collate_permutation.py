"""Batches for permutation language modelling (XLNet).

Owns: `DataCollatorForPermutationLanguageModeling`. Leaves to others: padding (collate_padding).
Source: Yang et al. 2019 (XLNet), section 2.3 and appendix A; `api.json` of both generations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainwright.data.collate_base import DataCollatorMixin, warn_of_replaced_labels
from trainwright.data.collate_padding import _torch_collate_batch
from trainwright.names import IGNORE_INDEX


@dataclass
class DataCollatorForPermutationLanguageModeling(DataCollatorMixin):
    """Chooses spans of 1 to `max_span_length` tokens to predict, and a random order in which tokens see each other.

    Of `span / plm_probability` tokens one span is predicted, at a random place among them. The batch holds `input_ids`
    and `labels` int64 `(batch, seq)`, and float `(batch, seq, seq)`: `perm_mask`, 1 where token i must not see token j,
    and `target_mapping`, the identity. `seq` must be even: the order is drawn for half the sequence and used for both,
    because training reuses half of it as memory.
    """

    tokenizer: Any
    plm_probability: float = 1 / 6
    max_span_length: int = 5
    return_tensors: str = "pt"

    def torch_call(self, examples: Any) -> dict[str, Any]:
        """Batch as torch tensors."""
        warn_of_replaced_labels(self, examples, "Remove that column.")
        rows = [row["input_ids"] if isinstance(row, Mapping) else row for row in examples]
        names = ("input_ids", "perm_mask", "target_mapping", "labels")
        return dict(zip(names, self.torch_mask_tokens(_torch_collate_batch(rows, self.tokenizer))))

    def numpy_call(self, examples: Any) -> dict[str, Any]:
        """As `torch_call`, in NumPy arrays; draws from the same torch generator."""
        return {name: value.numpy() for name, value in self.torch_call(examples).items()}

    def torch_mask_tokens(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(inputs, perm_mask, target_mapping, labels)` for int64 `inputs` `(batch, seq)`."""
        if getattr(self.tokenizer, "mask_token", None) is None:
            raise ValueError(
                "Permutation language modelling needs a mask token, and the tokenizer "
                f"({type(self.tokenizer).__name__}) has none. Add one with tokenizer.add_special_tokens."
            )
        batch, seq = inputs.shape
        if seq % 2:
            raise ValueError(
                f"Permutation language modelling needs batches of an even number of tokens, this one has {seq}. "
                "Truncate or pad samples to an even length."
            )
        in_span = torch.stack([self._spans(seq) for _ in range(batch)])  # (batch, seq)
        special = torch.isin(inputs, torch.tensor(self.tokenizer.all_special_ids, dtype=inputs.dtype))
        predicted = in_span & ~special  # (batch, seq)
        labels = inputs.masked_fill(~predicted, IGNORE_INDEX)
        perm_mask = torch.stack(
            [self._order(row_predicted, row_special) for row_predicted, row_special in zip(predicted, special)]
        )
        target_mapping = torch.eye(seq).repeat(batch, 1, 1)  # (batch, seq, seq)
        return inputs.masked_fill(predicted, self.tokenizer.mask_token_id), perm_mask, target_mapping, labels

    def numpy_mask_tokens(self, inputs: Any) -> tuple[Any, Any, Any, Any]:
        """As `torch_mask_tokens`, for arrays."""
        masked, perm_mask, target_mapping, labels = self.torch_mask_tokens(torch.as_tensor(inputs))
        return masked.numpy(), perm_mask.numpy(), target_mapping.numpy(), labels.numpy()

    def _spans(self, seq: int) -> torch.Tensor:
        """Which tokens of one sample lie in a span to predict, bool `(seq,)`."""
        in_span = torch.zeros(seq, dtype=torch.bool)
        begin = 0
        while begin < seq:
            span = int(torch.randint(1, self.max_span_length + 1, (1,)))
            context = int(span / self.plm_probability)
            start = begin + int(torch.randint(context - span + 1, (1,)))
            in_span[start : start + span] = True
            begin += context
        return in_span

    def _order(self, predicted: torch.Tensor, special: torch.Tensor) -> torch.Tensor:
        """Who must not see whom in one sample: float `(seq, seq)`, from `predicted` and `special`, both bool `(seq,)`.

        Tokens that are neither predicted nor special come first in the order, so all positions see them.
        """
        seq = len(predicted)
        halves = torch.arange(seq).reshape(2, seq // 2).T  # (seq / 2, 2)
        rank = halves[torch.randperm(seq // 2)].T.flatten()  # (seq,)
        rank = rank.masked_fill(~predicted & ~special, -1)
        return ((rank[:, None] <= rank[None, :]) & predicted).float()
