"""Samples that a loader repeated so that every process has a full last batch: they take no part in a mean loss.

Owns: predicting a batch without its repeated rows. Leaves to others: which rows those are (the strategy), leaving them
out of predictions and labels (gathering). A model gives one loss per batch, so nothing can be taken out of it later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainwright.nested import Nested, lists_samples, map_items
from trainwright.splitting import CannotSplit, first_rows, num_samples


def predict_own_rows(
    inputs: Any, predict_batch: Callable[[Any], tuple[Any, Nested, Nested]], num_own: Callable[[int], int]
) -> tuple[Any, Nested, Nested]:
    """(loss, logits, labels) of a batch, the loss that of its first `num_own(rows)` rows.

    Logits and labels keep the number of rows that gathering expects: the last own row stands for the repeated ones. A
    batch without an own row, and one whose rows cannot be told apart, is predicted as it is.
    """
    try:
        num_rows = num_samples(inputs)
    except CannotSplit:
        return predict_batch(inputs)
    own = num_own(num_rows)
    if own in (0, num_rows):
        return predict_batch(inputs)
    loss, logits, labels = predict_batch(first_rows(inputs, own))

    def filled(tensor: Any) -> Any:
        if lists_samples(tensor, own):
            return tensor + tensor[-1:] * (num_rows - own)
        if isinstance(tensor, (list, tuple, Mapping)):
            return map_items(filled, tensor)
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or len(tensor) != own:
            return tensor
        return torch.cat([tensor, tensor[-1:].expand(num_rows - own, *tensor.shape[1:])])

    return loss, filled(logits), filled(labels)
