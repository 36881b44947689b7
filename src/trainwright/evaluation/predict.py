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
        for name in label_names:  # noqa: SIM110  (a generator is a call per label and batch)
            if inputs.get(name) is None:
                return False
        return True
    asked = inputs.get("return_loss")
    return can_return_loss if asked is None else bool(asked)


def labels_in(inputs: Mapping[str, Any], label_names: Sequence[str]) -> Any:
    """The labels: None where there are none, the tensor where there is one, else a tuple."""
    if len(label_names) == 1:
        return _detached(inputs.get(label_names[0]))
    return tuple(_detached(inputs.get(name)) for name in label_names) or None


def predictions_in(outputs: Any, ignore_keys: Sequence[str], holds_loss: bool) -> Any:
    """The predictions among a model's outputs: all but the loss and `ignore_keys`; a tuple where there are several."""
    if isinstance(outputs, (dict, Mapping)):  # dict first: the check of an abstract class costs calls
        values = []
        for key, value in outputs.items():
            if key not in ignore_keys and not (holds_loss and key == "loss"):
                values.append(_detached(value))
    elif isinstance(outputs, torch.Tensor):
        values = [_detached(outputs)]
    else:
        values = [_detached(value) for value in (outputs[1:] if holds_loss else outputs)]
    return values[0] if len(values) == 1 else tuple(values)


def _detached(value: Any) -> Any:
    """`value` without its graph; what has none, as under `no_grad`, is not touched."""
    return value if type(value) is torch.Tensor and not value.requires_grad else nested_detach(value)


def ignored_outputs(model: Any) -> list[str]:
    """Outputs that the model's config says are no predictions (caches, hidden states)."""
    return list(getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", None) or [])
