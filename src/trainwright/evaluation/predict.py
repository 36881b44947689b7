"""One evaluation batch: what to ask of the model, and which of its outputs are predictions.

Owns: which inputs are labels, whether there is a loss, which outputs are predictions, and their order (`Predictor`).
Leaves to others: computing the loss (`Trainer.compute_loss`), devices, the loop over batches (`run`). Source: seed 001
(`prediction_step`, `label_names`, `ignore_keys`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from trainwright.evaluation.shortcuts import Shortcuts
from trainwright.interop.loaded import is_pretrained_config
from trainwright.linear_loss.deferred import DeferredLogits
from trainwright.loss import loss_of, no_scalar
from trainwright.nested import nested_detach

CACHES = ("past_key_values", "cache")  # the output of `transformers` up to 5.23, and since


class Predictor:
    """inputs -> (mean loss, predictions, labels), each None where there is none, on the model's device.

    Made once for an evaluation, so that a batch pays only for what can differ between batches.
    prepare: moves inputs to the device, and refuses a batch without any. compute_loss, loss_context: hooks of the
    Trainer. remember: given what a model without a loss returned, where the next batch needs it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        label_names: Sequence[str],
        can_return_loss: bool,
        ignore_keys: Sequence[str],
        loss_only: bool,
        prepare: Callable[[Any], Any],
        compute_loss: Callable[..., Any],
        loss_context: Callable[[], AbstractContextManager[Any]],
        remember: Callable[[Any], None] | None = None,
        look_at: Callable[[Any], None] | None = None,
        shortcuts: Shortcuts,
    ) -> None:
        self._model = model
        self._label_names, self._can_return_loss = label_names, can_return_loss
        self._label_name = label_names[0] if len(label_names) == 1 else None
        self._ignore_keys = ignore_keys
        self._loss_only = loss_only
        self._prepare, self._prepares = prepare, not shortcuts.prepare_inputs
        self._compute_loss, self._loss_context = compute_loss, loss_context
        self._is_plain = shortcuts.compute_loss  # whether the loss is what the model itself returns
        self._remember, self._look_at = remember, look_at

    def __call__(self, inputs: Any) -> tuple[torch.Tensor | None, Any, Any]:
        if self._look_at is not None:
            self._look_at(inputs)
        labels = None
        if self._label_name is not None:  # as nearly always
            labels = inputs.get(self._label_name)
            has_loss = labels is not None
        else:
            has_loss = gives_loss(inputs, self._label_names, self._can_return_loss)
        unprepared = None
        if self._prepares or not inputs:
            inputs = self._prepare(inputs)
            unprepared, labels = labels, None
        if has_loss and (type(labels) is not torch.Tensor or labels.requires_grad):
            labels = labels_in(inputs, self._label_names)
            if labels is None:  # an override of `_prepare_inputs` renamed them
                labels = _detached(unprepared)
        # `torch.no_grad()` in 3 calls, not 11. Not around the loop: a loader or a callback may want gradients.
        loss: torch.Tensor | None
        had_gradients = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            if has_loss and self._is_plain:
                outputs = self._model(**inputs)
                loss = loss_of(outputs, inputs)
            else:
                with self._loss_context():
                    loss, outputs = self._ask(inputs, has_loss)
            if loss is not None and (loss.ndim or loss.requires_grad):
                loss = loss.detach().mean()  # one per device, or of a model that turns gradients on
        finally:
            torch._C._set_grad_enabled(had_gradients)
        if self._loss_only:
            return loss, None, None
        holds_loss = has_loss and (self._is_plain or begins_with_loss(outputs, self._model))
        return loss, predictions_in(outputs, self._ignore_keys, holds_loss), labels

    def _ask(self, inputs: Any, has_loss: bool) -> tuple[torch.Tensor | None, Any]:
        if not has_loss:
            outputs = self._model(**inputs)
            if self._remember is not None:
                self._remember(outputs)
            return None, outputs
        # The hook may take labels out, as many do and ours for another loss function; they are still to be counted.
        found = self._compute_loss(self._model, copy.copy(inputs), return_outputs=True)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise TypeError(
                "compute_loss must return (loss, outputs) where return_outputs=True, as in an evaluation, but it "
                f"returned a {type(found).__name__}. End it with: return (loss, outputs) if return_outputs else loss."
            )
        loss, outputs = found
        if not isinstance(loss, torch.Tensor):
            raise no_scalar(loss)
        return loss, outputs


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


def begins_with_loss(outputs: Any, model: Any) -> bool:
    """Whether the first of a model's outputs is a loss, where the loss of the batch may have been computed elsewhere:
    a tuple of a model that was given no labels begins with a prediction.

    A loss is one number, or None in its place, or a number of each replica of a DataParallel `model`.
    """
    if isinstance(outputs, Mapping):
        return True  # which has it under its name, if at all
    first = outputs
    if isinstance(outputs, (tuple, list)):
        first = outputs[0] if outputs else None
    if isinstance(first, torch.Tensor):
        return first.ndim == 0 or (first.ndim == 1 and isinstance(model, nn.DataParallel))
    return first is None


def predictions_in(outputs: Any, ignore_keys: Sequence[str], holds_loss: bool) -> Any:
    """The predictions among a model's outputs: all but the loss and `ignore_keys`; a tuple where there are several.

    holds_loss: the loss is among them, under "loss" in a mapping, else first. A list of a dict for each sample, as
    detectors return it, is one prediction; an object that is none of these is its attributes.
    """
    if type(outputs) is dict or isinstance(outputs, Mapping):
        values = []
        for key, value in outputs.items():
            if key not in ignore_keys and not (holds_loss and key == "loss"):
                has_graph = type(value) not in (torch.Tensor, DeferredLogits) or value.requires_grad
                values.append(nested_detach(value) if has_graph else value)
    elif isinstance(outputs, torch.Tensor):
        values = [] if holds_loss and outputs.ndim == 0 else [_detached(outputs)]
    elif isinstance(outputs, list) and outputs and isinstance(outputs[0], Mapping):
        values = [_detached(outputs)]
    elif isinstance(outputs, (tuple, list)):
        values = [_detached(value) for value in (outputs[1:] if holds_loss else outputs)]
    else:
        return predictions_in(vars(outputs), ignore_keys, holds_loss)
    return values[0] if len(values) == 1 else tuple(values)


def _detached(value: Any) -> Any:
    """`value` without its graph; what has none, as under `no_grad`, is not touched."""
    is_detached = type(value) in (torch.Tensor, DeferredLogits) and not value.requires_grad
    return value if is_detached else nested_detach(value)


def ignored_outputs(model: Any, ignore_keys: Sequence[str] | None = None) -> list[str]:
    """Outputs that are no predictions: `ignore_keys`, else those that the model's config names, else caches.

    A configuration of `transformers` names none where it leaves out the cache only (5.24 and later). Each of the two
    names that caches had stands for both, so that a script may be older or newer than the installed release.
    """
    if ignore_keys is None:
        config = getattr(model, "config", None)
        ignore_keys = getattr(config, "keys_to_ignore_at_inference", None)
        if ignore_keys is None and config is not None and is_pretrained_config(config):
            return list(CACHES)
    keys = list(ignore_keys or ())
    for name, other in (CACHES, CACHES[::-1]):
        if name in keys and other not in keys:
            return [*keys, other]
    return keys


def drops_cache(model: Any, args: Any, ignore_keys: Sequence[str] | None) -> bool:
    """Whether an evaluation reads nothing of the keys and values that a model which generates keeps of past tokens."""
    return CACHES[0] in ignored_outputs(model, ignore_keys) and not args.use_cache and args.past_index < 0
