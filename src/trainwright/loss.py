"""From model outputs to a loss, and counting what a loss is averaged over.

Owns: picking the loss out of a model's outputs, label smoothing, counting items. Leaves to others: calling the model,
what a micro-batch weighs in an update (`micro_batch_weights`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainwright.names import IGNORE_INDEX

SHIFTED_LABELS = "shift_labels"  # labels that the data have moved to where the model predicts them


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


def targets_of(inputs: Any, labels: Any, label_names: Sequence[str], labels_are_shifted: bool) -> torch.Tensor | None:
    """The labels that a batch's loss is a mean over, (batch, ...); None where a sample is one item.

    That is so for labels that are no class indices, and where several labels share one loss. Labels are looked for in
    the inputs first: they are there even where only the loss was asked for.
    labels_are_shifted: position t predicts label t + 1, so a sample's first label is no target.
    """
    if isinstance(inputs, (dict, Mapping)) or hasattr(inputs, "keys"):  # dict first, which costs fewer calls
        if SHIFTED_LABELS in inputs and isinstance(inputs[SHIFTED_LABELS], torch.Tensor):
            return inputs[SHIFTED_LABELS]  # type: ignore[no-any-return]
        found, num_found = labels, 0
        for name in label_names:
            if name in inputs:
                found = inputs[name]
                num_found += 1
        labels = found if num_found < 2 else None
    if not isinstance(labels, torch.Tensor) or labels.ndim == 0 or labels.is_floating_point():
        return None
    return without_first(labels, labels_are_shifted)


def without_first(labels: torch.Tensor, labels_are_shifted: bool) -> torch.Tensor:
    """Labels (batch, ..., length) without the first of each sequence, where that is no target."""
    return labels[..., 1:] if labels_are_shifted and labels.ndim > 1 else labels


def count_items(batches: Iterable[Any], labels_are_shifted: bool) -> torch.Tensor | None:
    """Number of labels that take part in the loss of these micro-batches, of shape (), on the labels' device.

    Labels are (batch, ...), those of sequences (batch, length); one of -100 does not count. `labels_are_shifted`: the
    model predicts token t+1 at position t, so the first label of each sequence is never a target, unless a batch brings
    `shift_labels`, which are. None when a batch has no "labels" tensor: then nothing can be counted.
    """
    total: torch.Tensor | None = None
    for batch in batches:
        labels = batch.get("labels") if isinstance(batch, Mapping) or hasattr(batch, "get") else None
        if not isinstance(labels, torch.Tensor):
            return None
        if isinstance(batch.get(SHIFTED_LABELS), torch.Tensor):
            labels = batch[SHIFTED_LABELS]
        else:
            labels = without_first(labels, labels_are_shifted)
        count = (labels != IGNORE_INDEX).sum()  # (batch, ...) -> ()
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
        logits = _logits_of(model_output)  # (batch, ..., classes)
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


def _logits_of(outputs: Any) -> torch.Tensor:
    """Logits by name, else the first output with classes (a scalar before them is a loss)."""
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)):
        logits = next((value for value in outputs if isinstance(value, torch.Tensor) and value.ndim > 1), None)
    else:
        logits = getattr(outputs, "logits", outputs)
    if isinstance(logits, torch.Tensor) and logits.ndim > 1:
        return logits
    returned = f"the keys {list(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
    raise ValueError(
        f"label_smoothing_factor computes a loss from logits (batch, ..., classes), and the model returned {returned}. "
        'Return them under "logits" or first in a tuple, or set label_smoothing_factor=0.'
    )
