"""One evaluation batch: what to ask of the model, and what to keep of its answer.

Owns: which inputs are labels, whether there is a loss, which outputs are predictions. Leaves to others: computing the
loss (`Trainer.compute_loss`), devices, the loop over batches (`loop`). Source: seed 001 (`prediction_step`,
`label_names`, `ignore_keys`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainwright.evaluation.tensors import nested_detach


def gives_loss(inputs: Mapping[str, Any], label_names: Sequence[str], can_return_loss: bool) -> bool:
    """Whether the model can compute a loss from `inputs`: all labels are there, or it needs none (contrastive
    models).
    """
    if label_names:
        return all(inputs.get(name) is not None for name in label_names)
    asked = inputs.get("return_loss")
    return can_return_loss if asked is None else bool(asked)


def labels_in(inputs: Mapping[str, Any], label_names: Sequence[str]) -> Any:
    """The labels: None where there are none, the tensor where there is one, else a tuple."""
    labels = nested_detach(tuple(inputs.get(name) for name in label_names))
    return None if not labels else labels[0] if len(labels) == 1 else labels


def predictions_in(outputs: Any, ignore_keys: Sequence[str], holds_loss: bool) -> Any:
    """The predictions among a model's outputs: all but the loss and `ignore_keys`; a tuple where there are several."""
    values: tuple[Any, ...]
    if isinstance(outputs, Mapping):
        ignored = {*ignore_keys, "loss"} if holds_loss else set(ignore_keys)
        values = tuple(value for key, value in outputs.items() if key not in ignored)
    elif isinstance(outputs, torch.Tensor):
        values = (outputs,)
    else:
        values = tuple(outputs[1:] if holds_loss else outputs)
    values = nested_detach(values)
    return values[0] if len(values) == 1 else values


def ignored_outputs(model: Any) -> list[str]:
    """Outputs that the model's config says are no predictions (caches, hidden states)."""
    return list(getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", None) or [])
