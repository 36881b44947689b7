"""What each batch of an evaluation is added to: the mean loss, stored predictions, a metric that sees each batch.

Owns: `LoopSettings`, what is stored and how losses are averaged; `Accumulator`, which adds the loss and the rows of one
batch of one process and counts its samples. Leaves to others: averaging (`losses`), joining rows (`prediction_store`),
calling a metric (`batch_metrics`), several processes (`gathering`), several batches at once (`batch_coalescing`).
Source: seed 001 (the arguments about evaluation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainwright.evaluation.batch_metrics import BatchMetrics
from trainwright.evaluation.losses import EvalLosses, per_sample
from trainwright.evaluation.prediction_store import EvalLoopContainer
from trainwright.evaluation.spill import MemoryBudget
from trainwright.loss import targets_of
from trainwright.names import closest
from trainwright.nested import Nested, find_batch_size

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LoopSettings:
    """What an evaluation stores and how it averages. The names of the arguments that decide are in brackets.

    Raises ValueError for a `loss_average` that is neither "items" nor "batches".
    """

    prediction_loss_only: bool = False
    accumulation_steps: int | None = None  # batches between two moves to the host [eval_accumulation_steps]
    keep_predictions: bool = True  # False: only what metrics need of each batch, while they see it
    concat_batches: bool = True  # False: lists with an entry per batch [eval_do_concat_batches]
    include_inputs: bool = False  # [include_for_metrics]
    include_losses: bool = False  # [include_for_metrics]
    batch_metrics: bool = False  # compute_metrics sees each batch [batch_eval_metrics]
    loss_average: str = "items"  # "items": over labels, whatever the batch size; "batches": of batch means, by samples
    labels_are_shifted: bool = False  # position t predicts label t + 1, so a sample's first label is no target
    label_names: tuple[str, ...] = ("labels",)  # which inputs are labels [label_names]
    token_padding: int | None = None  # pads integers among the predictions, where these are generated tokens
    metric_key_prefix: str = "eval"
    memory_budget_gib: float | None = float("inf")  # of rows in main memory; None: see `spill` [eval_memory_budget_gib]
    output_dir: str = ""  # for files of rows beyond that

    @classmethod
    def of_run(cls, args: TrainingArguments, *, loss_only: bool, **others: Any) -> LoopSettings:
        """As the arguments of a run ask. `others`: the fields that these do not decide."""
        return cls(
            prediction_loss_only=loss_only,
            accumulation_steps=args.eval_accumulation_steps,
            concat_batches=args.eval_do_concat_batches,
            include_inputs="inputs" in args.include_for_metrics,
            include_losses="loss" in args.include_for_metrics,
            loss_average=args.eval_loss_average,
            memory_budget_gib=args.eval_memory_budget_gib,
            output_dir=str(args.output_dir),
            **others,
        )

    def __post_init__(self) -> None:
        if self.loss_average not in ("items", "batches"):
            hint = closest(self.loss_average, ("items", "batches"))
            raise ValueError(f'loss_average={self.loss_average!r} must be "items" or "batches".{hint}')

    @property
    def stores_predictions(self) -> bool:
        """Whether predictions and labels of a batch outlive it."""
        return self.keep_predictions and not self.prediction_loss_only

    @property
    def shows_batches(self) -> bool:
        """Whether `compute_metrics` is called with each batch."""
        return self.batch_metrics and not self.prediction_loss_only

    @property
    def needs_main_inputs(self) -> bool:
        return self.include_inputs and (self.stores_predictions or self.shows_batches)


@dataclass(frozen=True)
class Accumulated:
    """An evaluation's arrays, each None where there was nothing to add, in the order of the dataset."""

    predictions: Nested
    label_ids: Nested
    inputs: Nested
    losses: Array | None  # (num_samples,), float32
    items: Array | None  # (num_samples,): what each of the losses is a mean of
    num_rows: list[int]  # of each batch, all processes together

    def losses_to_show(self, concat_batches: bool) -> Any:
        """`losses`, or a list with an array per batch where batches are not concatenated."""
        if self.losses is None or concat_batches:
            return self.losses
        return np.split(self.losses, np.cumsum(self.num_rows)[:-1])


class Accumulator:
    """Adds up the batches of a single process.

    main_inputs: inputs -> those that are stored with predictions, or shown to `batch_metrics`. batch_metrics: sees each
    batch. budget: main memory that rows may take before they go to files.
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        main_inputs: Callable[[Any], Nested] | None = None,
        batch_metrics: BatchMetrics | None = None,
        budget: MemoryBudget | None = None,
    ) -> None:
        self.settings = settings
        self.losses = EvalLosses()
        self.num_rows: list[int] = []  # of each batch
        concat = settings.concat_batches
        self.predictions = EvalLoopContainer(concat, budget=budget, token_padding=settings.token_padding)
        self.label_ids, self.inputs = (EvalLoopContainer(concat, budget=budget) for _ in range(2))
        self._main_inputs, self._batch_metrics = main_inputs, batch_metrics
        self._stores = settings.stores_predictions
        self._uses_rows = self._stores or settings.shows_batches
        self._shows_losses = batch_metrics is not None and settings.include_losses

    def add(self, inputs: Any, loss: torch.Tensor | None, logits: Nested, labels: Nested) -> None:
        """Add a batch: what the loader gave, and what predicting it returned."""
        num_rows = rows_of(inputs, labels, logits)
        losses = None
        if loss is not None:
            targets = self.targets(inputs, labels)
            if self._shows_losses:
                losses, items = per_sample(loss, targets, num_rows)
                self.losses.add_samples(losses, items)
            else:
                self.losses.add_batch(loss, targets, num_rows)
        if self._uses_rows:
            main_inputs = None if self._main_inputs is None else self._main_inputs(inputs)
            self.add_rows(logits, labels, main_inputs, losses, num_rows)
        self.count([num_rows])

    def targets(self, inputs: Any, labels: Nested) -> torch.Tensor | None:
        """The labels that the batch's loss is a mean over, (batch, ...); None where each sample is one item."""
        settings = self.settings
        if settings.loss_average != "items":
            return None
        return targets_of(inputs, labels, settings.label_names, settings.labels_are_shifted)

    def add_rows(
        self, logits: Nested, labels: Nested, main_inputs: Nested, losses: torch.Tensor | None, num_rows: int
    ) -> None:
        """Store the rows of a batch of `num_rows` samples, and show them to the metrics that see each batch."""
        if self._stores:
            self.predictions.add(logits, num_rows)
            self.label_ids.add(labels, num_rows)
        if self._batch_metrics is not None:
            self._batch_metrics.add(logits, labels, main_inputs, losses if self._shows_losses else None)
        elif self._main_inputs is not None:
            self.inputs.add(main_inputs, num_rows)

    def count(self, num_rows: list[int]) -> None:
        """Count batches of so many rows each; move rows to the host every `accumulation_steps` batches."""
        self.num_rows += num_rows
        steps = self.settings.accumulation_steps
        if steps is not None and len(self.num_rows) % steps == 0:
            for container in (self.predictions, self.label_ids, self.inputs):
                container.to_cpu_and_numpy()

    def result(self, limit: int | None, order: Callable[[], Any]) -> Accumulated:
        """All there is, once, after the last batch: at most `limit` samples. Waits for the device.

        order: gives the sample that each row is (num_samples,), or None where they are in order.
        """
        num_rows = sum(self.num_rows)
        num_samples = num_rows if limit is None else min(num_rows, limit)
        places = places_of(order(), num_samples) if self.settings.concat_batches else None
        predictions, label_ids, inputs = (
            container.get_arrays(places, num_rows, num_samples)
            for container in (self.predictions, self.label_ids, self.inputs)
        )
        losses, items = self.losses.arrays()
        if places is not None and losses is not None and items is not None and len(losses) == num_rows:
            losses, items = placed(losses, places), placed(items, places)
        if losses is not None and items is not None and len(losses) == num_rows:
            losses, items = losses[:num_samples], items[:num_samples]
        return Accumulated(predictions, label_ids, inputs, losses, items, self.num_rows)


def rows_of(*tensors: Nested, otherwise: int = 1) -> int:
    """The samples of a batch: rows of the first of `tensors` that has rows."""
    for candidate in tensors:
        if type(candidate) is torch.Tensor and candidate.ndim:
            return candidate.shape[0]
        if type(candidate) is dict:  # what a collator makes; its first column mostly decides
            for value in candidate.values():
                if type(value) is torch.Tensor and value.ndim:
                    return value.shape[0]
                break
        size = _length_of_lists(candidate)
        if size is None:
            size = find_batch_size(candidate)
        if size is not None:
            return size
    return otherwise


def _length_of_lists(candidate: Nested) -> int | None:
    """The samples of a batch that has a list with an entry for each, such as images of different size, and no tensor;
    None where there is none. A list of tensors alone may be one of outputs.
    """
    if isinstance(candidate, Mapping):
        if any(isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim for value in candidate.values()):
            return None
        return next((len(value) for value in candidate.values() if type(value) is list and value), None)
    if type(candidate) is list and candidate and isinstance(candidate[0], (Mapping, str)):
        return len(candidate)
    return None


def main_input_of(
    name: str, prepare: Callable[[Any], Any] | None, settings: LoopSettings
) -> Callable[[Any], Nested] | None:
    """inputs -> the model's main one, to be stored (with `batch_metrics` all of them, to be shown), moved to the device
    by `prepare`; None where none is asked for. It raises KeyError for a batch without an input of that name.
    """
    if not settings.needs_main_inputs:
        return None

    def main_inputs(inputs: Any) -> Nested:
        if not settings.batch_metrics:
            if name not in inputs:
                raise KeyError(
                    f'include_for_metrics=["inputs"] keeps the model\'s main input {name!r}, but a batch has '
                    f"{list(inputs)}.{closest(name, inputs)} The model names it in `main_input_name`."
                )
            inputs = inputs[name]
        return inputs if prepare is None else prepare(inputs)

    return main_inputs


def places_of(sampled: Any, num_samples: int) -> Array | None:
    """Where each of the first `num_samples` rows belongs, if row i is sample `sampled[i]`; None where that is unknown.

    A loader that drops its last batch leaves samples out; the others close up.
    """
    if sampled is None or len(sampled) < num_samples:
        return None
    by_sample = np.argsort(np.asarray(sampled)[:num_samples], kind="stable")
    places = np.empty_like(by_sample)
    places[by_sample] = np.arange(num_samples)
    return places


def placed(values: Array, places: Array) -> Array:
    result = np.empty_like(values, shape=places.shape)
    result[places] = values[: len(places)]
    return result
