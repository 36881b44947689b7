"""From model outputs to a loss, and counting what a loss is averaged over.

Owns: picking the loss out of a model's outputs, label smoothing, counting items. Leaves to others: calling the model,
dividing for accumulation (Trainer.training_step).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainwright.names import IGNORE_INDEX


def loss_of(outputs: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The loss in a model's outputs: the value under "loss" of a mapping, else the first element of a tuple, else the
    outputs themselves when they are a single scalar.

    Raises ValueError when there is none, naming what the model returned and what it received.
    """
    loss = outputs
    if isinstance(outputs, (dict, Mapping)):  # dict first: the check of an abstract class costs calls
        loss = outputs.get("loss")
    elif isinstance(outputs, (tuple, list)):
        loss = outputs[0] if outputs else None
    elif hasattr(outputs, "loss"):
        loss = outputs.loss
    # One loss, or one of each replica in DataParallel; anything larger is the model's predictions.
    is_tensor = type(loss) is torch.Tensor or isinstance(loss, torch.Tensor)  # the first, as nearly always, is no call
    if is_tensor and (loss.ndim == 0 or (loss.ndim == 1 and loss is not outputs)):
        return loss  # type: ignore[no-any-return]
    returned = f"the keys {list(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
    if isinstance(loss, torch.Tensor):
        returned += f" whose loss has the shape {tuple(loss.shape)}, which is no scalar"
    raise ValueError(
        f"The model returned no loss, but {returned}. It was given {list(inputs)}. Training needs labels among the "
        'inputs and a model that returns its loss, a scalar, first in a tuple or under the key "loss"; or pass '
        "compute_loss_func=, or override compute_loss."
    )


def no_scalar(loss: Any) -> Exception:
    """What to raise where an override of `compute_loss` gave something else than one number."""
    if isinstance(loss, torch.Tensor):
        return ValueError(f"The loss must be one number, but compute_loss gave {tuple(loss.shape)}: take its mean.")
    return TypeError(f"compute_loss must return the loss, a tensor of one number, but it returned {loss!r}.")


def count_items(batches: Iterable[Any], labels_are_shifted: bool) -> torch.Tensor | None:
    """Number of labels that take part in the loss of these micro-batches, as a scalar on the labels' device.

    A label of -100 does not count. `labels_are_shifted`: the model predicts token t+1 at position t, so the first label
    of each sequence is never a target. None when a batch has no "labels" tensor: then nothing can be counted.
    """
    total: torch.Tensor | None = None
    for batch in batches:
        labels = batch.get("labels") if isinstance(batch, Mapping) or hasattr(batch, "get") else None
        if not isinstance(labels, torch.Tensor):
            return None
        if labels_are_shifted and labels.dim() > 1:
            labels = labels[..., 1:]
        count = (labels != IGNORE_INDEX).sum()
        total = count if total is None else total + count
    return total


@dataclass
class LabelSmoother:
    """Cross-entropy against softened targets.

    Each target is `1 - epsilon + epsilon / num_classes` on the right class and `epsilon / num_classes` elsewhere, so
    loss = (1 - epsilon) * nll + epsilon * mean over classes of -log p, averaged over the labels that are not
    `ignore_index`. Source: seed 001 (`label_smoothing_factor`).
    """

    epsilon: float = 0.1
    ignore_index: int = IGNORE_INDEX

    def __call__(
        self,
        model_output: Any,
        labels: torch.Tensor,
        shift_labels: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """`labels`: (batch, ...) class indices. `shift_labels`: logits at t predict the label at t+1. The sum is
        divided by `num_items_in_batch` where given, so that accumulated micro-batches add up to the mean over the whole
        update.
        """
        logits = (
            model_output["logits"] if isinstance(model_output, Mapping) else model_output[0]
        )  # (batch, ..., classes)
        if shift_labels:
            logits = logits[..., :-1, :]
            labels = labels[..., 1:]
        # One fused kernel: no (batch, seq, classes) copy of the log-softmax is kept.
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(),
            labels.reshape(-1),
            ignore_index=self.ignore_index,
            label_smoothing=self.epsilon,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch
