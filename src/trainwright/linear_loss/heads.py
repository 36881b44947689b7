"""Which models compute their loss without logits, and when.

Owns: finding the head of a model, its switch while the model is called, the decision after the first call. Leaves to
others: what is done with deferred logits (`deferred`), what is called (Trainer).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from trainwright.interop.models import base_model_of
from trainwright.linear_loss.check import difference_from_logits
from trainwright.linear_loss.deferred import DeferredLogits, Watcher
from trainwright.linear_loss.function import Term, is_on_host
from trainwright.loss import SHIFTED_LABELS
from trainwright.names import IGNORE_INDEX
from trainwright.seeding import RngState, accelerators

logger = logging.getLogger(__name__)
T = TypeVar("T")

# With "auto", a head of fewer classes is left alone: its logits are no larger than other activations of the model.
FEWEST_CLASSES = 4096
PLAIN_WEIGHTS = (nn.Parameter, torch.Tensor)


class NotPossible(Exception):
    """The loss cannot be computed without the logits, for the reason in the text."""


class LinearLoss(Watcher):
    """The loss of one model without its logits, within `run`, once the first call has shown that it is the same.

    heads: its linear output layer, or layers where one adapts another. is_required: `linear_cross_entropy=True`, where
    a model that is left alone is an error.
    """

    def __init__(self, model: nn.Module, heads: list[nn.Linear], *, is_required: bool) -> None:
        self._model, self._heads, self._is_required = model, heads, is_required
        self.num_classes = heads[0].out_features
        self._trusts_counts = True
        self._ignore_index = IGNORE_INDEX
        self._num_calls = self._num_losses = 0  # in a trial
        self._compared = 0  # 1: losses, as where no gradients are made; 2: gradients, too
        self._is_tried = self.is_active = False
        self.reason: str | None = None  # why this model is left alone

    @property
    def is_wanted(self) -> bool:
        """Whether `run` does more than call its argument: not inside itself, and not for a model that is left alone."""
        return self.reason is None and not self.is_active

    @property
    def is_checked(self) -> bool:
        """Whether all that a call makes now was compared: the loss, and where they are made, its gradients."""
        return self._compared > torch.is_grad_enabled()

    def run(self, compute: Callable[[], T]) -> T:
        """What `compute` returns; in it, the model's head gives deferred logits, unless this model is left alone.

        In the first call the loss is compared, and in the first that makes gradients, these. Where it differs,
        `compute` is called again from the same random states, and from then on with logits.
        """
        if not self.is_wanted:
            return compute()
        if self.is_checked:
            return self._deferring(compute)
        self.reason = why_not_called(self._model, self._heads)
        if self.reason is None:
            random_states = RngState.capture(accelerators(), every_device=False)
            try:
                return self._try(compute)
            except NotPossible as error:
                self.reason = str(error)
            random_states.restore()
        try:
            result = compute()
        except BaseException:
            self.reason = None  # the error has nothing to do with deferred logits
            raise
        if self._is_required:
            raise ValueError(f"{refusal(self._model, self.reason)} Set linear_cross_entropy='auto' or False.")
        logger.info(refusal(self._model, self.reason))
        return result

    def calling(self, model: Callable[..., Any]) -> Any:
        """`model`, called within `run`."""
        return lambda *args, **inputs: self.run(lambda: model(*args, **inputs))

    def check_labels(self, batches: Iterable[Any]) -> None:
        """Raise ValueError for a label that is no class, of batches whose labels are in the host's memory."""
        for number, batch in enumerate(batches):
            self._check(batch, f"micro-batch {number}")

    def look_at_evaluated(self, batch: Any) -> None:
        """`check_labels` and `count_labels` of one batch of an evaluation."""
        self._check(batch, "a batch to evaluate")
        self.count_labels(batch)

    def _check(self, batch: Any, where: str) -> None:
        for name, labels in _labels_on_host(batch):
            is_wrong = labels >= self.num_classes
            if self._compared:  # before, it is not known what the model ignores
                is_wrong |= (labels < 0) & (labels != self._ignore_index) & (labels != IGNORE_INDEX)
            if is_wrong.any():
                place = is_wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"{name}{place} of {where} is {int(labels[tuple(place)])}, which is no class: the output layer of "
                    f"{_name(self._model)} has {self.num_classes}, 0 to {self.num_classes - 1}. A label that is to be "
                    "left out is -100. A tokenizer with added tokens needs "
                    "model.resize_token_embeddings(len(tokenizer))."
                )

    def count_labels(self, batch: Any) -> None:
        """Before `run` computes the loss of `batch` on a device, while its labels are in the host's memory: count them,
        so that rows without a label need not go through the head. Without this call all rows do.
        """
        self.most_labels = None
        if self._trusts_counts and not is_on_host(self._heads[0].weight):
            counts = [int((labels != IGNORE_INDEX).sum()) for _, labels in _labels_on_host(batch)]
            self.most_labels = max(counts) + 1 if counts else None  # one may be lent to a batch without any

    def needs_logits(self, operation: str) -> None:
        if self._is_tried:
            raise NotPossible(f"torch's {operation} is applied to them")

    def before_loss(self, logits: DeferredLogits, targets: torch.Tensor, **settings: Any) -> None:
        if not self._is_tried:
            return
        if any(weight.untyped_storage().size() == 0 for _, weight in logits.terms):
            raise NotPossible("its loss is computed when its weights are divided again, after the model's call")
        self._num_losses += 1
        self._ignore_index = settings["ignore_index"]
        if self.most_labels is not None and int((targets != self._ignore_index).sum()) > self.most_labels:
            self._trusts_counts, self.most_labels = False, None  # its loss has more labels than its batch
        if torch.is_grad_enabled():  # before the gradients of the loss itself are there
            self._compare(logits, targets, **settings)

    def after_loss(self, logits: DeferredLogits, targets: torch.Tensor, **settings: Any) -> None:
        # MKL keeps a buffer of some MiB for each product that is larger than any before: so the largest first.
        if self._is_tried and not torch.is_grad_enabled():
            self._compare(logits, targets, **settings)

    def _compare(self, logits: DeferredLogits, targets: torch.Tensor, **settings: Any) -> None:
        difference = difference_from_logits(logits, targets, **settings)
        if difference is not None:
            raise NotPossible(difference)

    def _try(self, compute: Callable[[], T]) -> T:
        """As `_deferring`, with everything that can show that logits are needed. Raises NotPossible."""
        self._num_calls = self._num_losses = 0
        self._is_tried = True
        try:
            result = self._deferring(compute)
        except (NotPossible, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # its code does something with deferred logits; or the error is its own, then again
            raise NotPossible(f"a trial ended in {type(error).__name__}: {error}") from error
        finally:
            self._is_tried = False
        if not self._num_calls:
            raise NotPossible("it does not call its output layer")
        if self._num_losses:  # not without labels
            self._compared = 1 + torch.is_grad_enabled()
        return result

    def _deferring(self, compute: Callable[[], T]) -> T:
        # In the instance's dictionary, where torch looks first, and only for this long, so that copies of the model
        # compute with their own weights. Hooks of the head are called as always.
        for head in self._heads:
            vars(head)["forward"] = _Forward(head, self)
        self.is_active = True
        try:
            return compute()
        finally:
            self.is_active, self.most_labels = False, None
            for head in self._heads:
                vars(head).pop("forward", None)

    def logits_of(self, head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        self._num_calls += 1
        weight = head.weight
        if type(weight) not in PLAIN_WEIGHTS:
            raise NotPossible(f"its output layer has a weight of type {type(weight).__name__}")
        return DeferredLogits([Term(hidden, weight)], head.bias, watcher=self)


def _labels_on_host(batch: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The class indices of a batch that the host can read at once, by their names."""
    for name in (SHIFTED_LABELS, "labels"):
        labels = batch.get(name) if isinstance(batch, Mapping) or hasattr(batch, "get") else None
        if isinstance(labels, torch.Tensor) and labels.is_cpu and not labels.is_floating_point():
            yield name, labels


class _Forward:
    """The forward of a head, in whose place it is."""

    def __init__(self, head: nn.Linear, loss: LinearLoss) -> None:
        self._head, self._loss = head, loss

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return self._loss.logits_of(self._head, input)


def linear_loss_of(model: nn.Module, asked: bool | str, obstacle: str | None = None) -> LinearLoss | None:
    """The loss without logits of `model`, as `linear_cross_entropy` asks; None where it computes logits.

    obstacle: why it is not to be, whatever the model is. Raises ValueError where True cannot be had.
    """
    if asked is False:
        return None
    heads, reason = heads_of(model)
    is_wide = heads and heads[0].out_features >= FEWEST_CLASSES
    reason = reason or obstacle
    if reason is None and (is_wide or asked is True):
        return LinearLoss(model, heads, is_required=asked is True)
    if asked is True:
        raise ValueError(f"{refusal(model, reason)} Set linear_cross_entropy='auto' or False.")
    if is_wide:
        logger.info(refusal(model, reason))
    return None


def heads_of(model: nn.Module) -> tuple[list[nn.Linear], str | None]:
    """The linear layers that the logits of a model are the sum of, and why they are none that can be used."""
    base: Any = base_model_of(model)
    find = getattr(base, "get_output_embeddings", None)
    layer = find() if callable(find) else None
    if layer is None:
        layer = _classifier(base)
    if layer is None:
        return [], "it names no output layer (get_output_embeddings() returns it)"
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    # Of an adapter (peft), the layer below it and what leads to as many classes.
    widest = max((module.out_features for module in linear), default=0)
    heads = [module for module in linear if module.out_features == widest]
    if not heads:
        return [], f"its output layer is a {type(layer).__name__}"
    for head in heads:
        if type(head) is not nn.Linear:
            return heads, f"its output layer is a {type(head).__name__}"
        if type(head.weight) not in PLAIN_WEIGHTS and not hasattr(head.weight, "device_mesh"):
            return heads, f"its output layer has a weight of type {type(head.weight).__name__}"
    return heads, None


def _classifier(model: Any) -> nn.Module | None:
    """The output layer of a model that classifies tokens, which no method returns."""
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    for name in ("classifier", "score"):
        layer = getattr(model, name, None)
        if isinstance(layer, nn.Linear) and layer.out_features == num_labels:
            return layer
    return None


def why_not_called(model: nn.Module, heads: list[nn.Linear]) -> str | None:
    """Why the heads of `model`, as they are now, cannot give deferred logits; None where they can."""
    if heads_of(model)[0] != heads:
        return "its output layer is another one than when the Trainer was made"
    above = _above(model, heads[0])
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in above):
        return "it is compiled as a whole (use_regional_compilation=True compiles its blocks)"
    for head in heads:
        if "forward" in vars(head):
            return "the forward of its output layer was replaced"
        if head._backward_hooks or head._backward_pre_hooks:
            return "its output layer has backward hooks"
        if head.weight.is_meta:
            return "its output layer is on the meta device"
        if hasattr(head.weight, "ds_id"):
            return "DeepSpeed divides its output layer over processes"
    return None


def _above(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The modules that contain `head`, itself included."""
    name = next((name for name, module in model.named_modules() if module is head), "")
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:length])) for length in range(len(parts) + 1)]


def refusal(model: nn.Module, reason: str | None) -> str:
    return f"linear_cross_entropy: {_name(model)} computes all its logits: {reason}."


def _name(model: nn.Module) -> str:
    return type(base_model_of(model)).__name__
