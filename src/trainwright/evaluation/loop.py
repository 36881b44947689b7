"""The evaluation loop: predict every batch, keep what was asked for, average the loss, compute metrics.

Owns: the order of these and their meaning; it reads the device once, at the end (and at every `accumulation_steps`).
Leaves to others: predicting one batch, gathering across processes, joining rows (`buffers`), averaging (`losses`),
metrics without rows (`streaming`), timing and logging. A batch costs few calls: `tests/loop/test_evaluation_cost.py`.
Source: seed 001 (`evaluation_loop` and the arguments about evaluation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainwright.data.receiving import iterate_ahead
from trainwright.evaluation.buffers import EvalLoopContainer
from trainwright.evaluation.losses import EvalLosses, per_sample, targets_of, weighted_mean
from trainwright.evaluation.metrics import prefixed
from trainwright.evaluation.spill import MemoryBudget
from trainwright.evaluation.streaming import StreamingMetrics
from trainwright.evaluation.tensors import Nested, denumpify_detensorize, find_batch_size, nested_truncate
from trainwright.interop.signatures import accepts
from trainwright.names import IGNORE_INDEX, closest
from trainwright.outputs import EvalLoopOutput, EvalPrediction

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LoopSettings:
    """What an evaluation keeps and how it averages; the names of the arguments that decide are in brackets.

    Raises ValueError for a `loss_average` that is neither "items" nor "batches".
    """

    prediction_loss_only: bool = False
    accumulation_steps: int | None = None  # batches between two moves to the host [eval_accumulation_steps]
    keep_predictions: bool = True  # False: only what metrics need of each batch, while they see it
    concat_batches: bool = True  # False: lists with an entry per batch [eval_do_concat_batches]
    include_inputs: bool = False  # [include_for_metrics]
    include_losses: bool = False  # [include_for_metrics]
    batch_metrics: bool = False  # compute_metrics sees each batch and nothing is kept [batch_eval_metrics]
    loss_average: str = "items"  # "items": over labels, whatever the batch size; "batches": of batch means, by samples
    labels_are_shifted: bool = False  # position t predicts label t + 1, so a sample's first label is no target
    label_names: tuple[str, ...] = ("labels",)  # where labels stand in the inputs [label_names]
    metric_key_prefix: str = "eval"

    def __post_init__(self) -> None:
        if self.loss_average not in ("items", "batches"):
            hint = closest(self.loss_average, ("items", "batches"))
            raise ValueError(f'loss_average={self.loss_average!r} must be "items" or "batches".{hint}')


def run_evaluation(
    dataloader: Iterable[Any],
    settings: LoopSettings,
    *,
    predict_batch: Callable[[Any], tuple[torch.Tensor | None, Nested, Nested]],
    compute_metrics: Callable[..., Any] | None = None,
    streaming: StreamingMetrics | None = None,
    preprocess_logits: Callable[[Nested, Nested], Nested] | None = None,
    gather: Callable[[Nested], Nested] | None = None,
    pad_across_processes: Callable[..., Nested] | None = None,
    after_batch: Callable[[], None] | None = None,
    average_losses: Callable[[Array], float] | None = None,
    num_samples_expected: int | None = None,
    main_input_name: str = "input_ids",
    prepare_inputs: Callable[[Any], Any] | None = None,
    order: Callable[[], Any] | None = None,
    budget: MemoryBudget | None = None,
) -> EvalLoopOutput:
    """Evaluate over `dataloader`.

    predict_batch: inputs -> (mean loss or None, logits or None, labels or None), on any device.
    compute_metrics: given an EvalPrediction once, where there are predictions and labels; with `batch_metrics` once per
        batch, with compute_result=True on the last one. Must return a dict.
    streaming: metrics that are given each batch, in place of `compute_metrics`.
    preprocess_logits: (logits, labels) -> what to keep instead of the logits.
    gather: rows of all processes, without the samples that were repeated to make shares equal.
    pad_across_processes: called as (tensors, dim=1, pad_index=-100) before `gather`.
    average_losses: losses (num_samples,), each sample's being the mean of its batch -> loss; instead of `loss_average`.
    num_samples_expected: length of the dataset, where known: what was gathered beyond it is cut off.
    prepare_inputs: moves the inputs that `include_inputs` keeps to the device, which gathering needs.
    order: asked after the last batch for the sample that each row is (num_samples,), where batches did not come in the
        order of the dataset: rows are returned in that order. None: they come as they were.
    budget: main memory that rows may take before they go to files.

    Raises ValueError before the first batch for a `compute_metrics` that cannot take compute_result but must, TypeError
    for one that returns no dict.
    """
    if settings.batch_metrics and compute_metrics is not None:
        _check_takes_compute_result(compute_metrics)

    def across_processes(tensors: Nested) -> Nested:
        if tensors is None or gather is None:
            return tensors
        if pad_across_processes is not None:
            tensors = pad_across_processes(tensors, dim=1, pad_index=IGNORE_INDEX)
        return gather(tensors)

    kept = _Kept(settings.concat_batches, budget)
    keeps_losses_apart = settings.batch_metrics and settings.include_losses
    pending: EvalPrediction | None = None  # with batch_metrics: held back until it is known not to be the last
    if streaming is not None:
        streaming.reset()

    for step, inputs in enumerate(iterate_ahead(dataloader), start=1):
        loss, logits, labels = predict_batch(inputs)
        num_rows = _num_rows(inputs, labels, logits)
        losses: Any = None
        if loss is not None:
            targets = None
            if settings.loss_average == "items":
                targets = targets_of(inputs, labels, settings.label_names, settings.labels_are_shifted)
            if gather is not None or keeps_losses_apart:
                losses, items = per_sample(loss, targets, num_rows)
                if gather is not None:
                    losses, items = gather(torch.stack((losses, items.to(losses.device)), dim=1)).unbind(dim=1)
                kept.losses.add_samples(losses, items)
            else:
                kept.losses.add_batch(loss, targets, num_rows)
        if settings.prediction_loss_only:
            logits = labels = None
        if logits is not None and preprocess_logits is not None:
            logits = preprocess_logits(logits, labels)
        if streaming is not None and logits is not None and labels is not None:
            streaming.update(logits, labels, across_processes)
        if settings.keep_predictions or settings.batch_metrics:
            main_inputs = _inputs_to_keep(inputs, settings, main_input_name, prepare_inputs)
            if gather is not None:
                logits, labels = across_processes(logits), across_processes(labels)
                main_inputs = across_processes(main_inputs)
        else:
            logits = labels = main_inputs = None
        if gather is not None:
            num_rows = _num_rows(losses, logits, labels, otherwise=num_rows)
        kept.num_rows.append(num_rows)

        if not settings.batch_metrics:
            kept.add(logits, labels, main_inputs)
            if settings.accumulation_steps is not None and step % settings.accumulation_steps == 0:
                kept.to_host()
        elif compute_metrics is not None and logits is not None and labels is not None:
            if pending is not None:
                compute_metrics(pending, compute_result=False)
            pending = EvalPrediction(logits, labels, main_inputs, losses if settings.include_losses else None)
        if after_batch is not None:
            after_batch()

    predictions, label_ids, main_inputs, losses, items = kept.arrays(num_samples_expected if gather else None, order)
    metrics: dict[str, Any] = {}
    if streaming is not None:
        metrics = streaming.compute()
    elif pending is not None and compute_metrics is not None:
        metrics = _as_dict(compute_metrics(pending, compute_result=True), "with compute_result=True ")
    elif compute_metrics is not None and predictions is not None and label_ids is not None:
        losses_to_show = kept.per_batch(losses) if settings.include_losses else None
        metrics = _as_dict(compute_metrics(EvalPrediction(predictions, label_ids, main_inputs, losses_to_show)))
    if losses is not None:
        mean_loss = average_losses(losses) if average_losses is not None else weighted_mean(losses, items)
        metrics[f"{settings.metric_key_prefix}_loss"] = float(mean_loss)
    num_samples = sum(kept.num_rows) if num_samples_expected is None else num_samples_expected
    metrics = prefixed(denumpify_detensorize(metrics), settings.metric_key_prefix)
    return EvalLoopOutput(predictions, label_ids, metrics, num_samples)


def _num_rows(*tensors: Nested, otherwise: int = 1) -> int:
    """The samples of a batch: rows of the first of `tensors` that has rows."""
    for candidate in tensors:
        if type(candidate) is torch.Tensor and candidate.ndim:
            return candidate.shape[0]
        if type(candidate) is dict:  # what a collator makes; its first column mostly settles it
            for value in candidate.values():
                if type(value) is torch.Tensor and value.ndim:
                    return value.shape[0]
                break
        size = find_batch_size(candidate)
        if size is not None:
            return size
    return otherwise


class _Kept:
    """What the batches gave, for the end."""

    def __init__(self, concat_batches: bool, budget: MemoryBudget | None) -> None:
        self.concat_batches = concat_batches
        self.rows = [EvalLoopContainer(concat_batches, budget=budget) for _ in range(3)]  # predictions, labels, inputs
        self.losses = EvalLosses()
        self.num_rows: list[int] = []  # of each batch, all processes together

    def add(self, logits: Nested, labels: Nested, main_inputs: Nested) -> None:
        predictions, label_ids, inputs = self.rows
        predictions.add(logits)
        label_ids.add(labels)
        inputs.add(main_inputs)

    def to_host(self) -> None:
        for container in self.rows:
            container.to_cpu_and_numpy()

    def arrays(self, limit: int | None, order: Callable[[], Any] | None) -> tuple[Nested, ...]:
        """Predictions, labels, inputs, losses, items: None where nothing came, at most `limit` samples, in the order of
        the dataset.
        """
        num_rows = sum(self.num_rows)
        num_samples = num_rows if limit is None else min(num_rows, limit)
        sampled = order() if order is not None and self.concat_batches else None
        positions = None if sampled is None else _places(np.asarray(sampled), num_samples)
        collected = [container.get_arrays(positions, num_rows) for container in self.rows]
        losses, items = self.losses.arrays()
        if positions is not None and losses is not None and items is not None and len(losses) == num_rows:
            losses, items = _placed(losses, positions), _placed(items, positions)
        # Rows that are no samples, such as one per token, stay as they are.
        return tuple(
            nested_truncate(rows, num_samples) if num_samples < num_rows and find_batch_size(rows) == num_rows else rows
            for rows in (*collected, losses, items)
        )

    def per_batch(self, losses: Array | None) -> Any:
        """`losses` (num_samples,), or a list with an array per batch where batches are kept apart."""
        return losses if losses is None or self.concat_batches else np.split(losses, np.cumsum(self.num_rows)[:-1])


def _places(sampled: Array, num_samples: int) -> Array | None:
    """Where each of the first `num_samples` rows belongs, if row i is sample `sampled[i]`; None where that is unknown.

    A loader that drops its last batch leaves samples out; the others close up.
    """
    if len(sampled) < num_samples:
        return None
    by_sample = np.argsort(sampled[:num_samples], kind="stable")
    places = np.empty_like(by_sample)
    places[by_sample] = np.arange(num_samples)
    return places


def _placed(values: Array, places: Array) -> Array:
    result = np.empty_like(values, shape=places.shape)
    result[places] = values[: len(places)]
    return result


def _inputs_to_keep(
    inputs: Any, settings: LoopSettings, main_input_name: str, prepare_inputs: Callable[[Any], Any] | None
) -> Nested:
    """The model's main input; with `batch_metrics`, which keeps nothing, all inputs. None where not asked for."""
    if not settings.include_inputs or settings.prediction_loss_only:
        return None
    if not settings.batch_metrics:
        if main_input_name not in inputs:
            raise KeyError(
                f'include_for_metrics=["inputs"] keeps the model\'s main input {main_input_name!r}, but a batch has '
                f"{list(inputs)}.{closest(main_input_name, inputs)} The model names it in `main_input_name`."
            )
        inputs = inputs[main_input_name]
    return inputs if prepare_inputs is None else prepare_inputs(inputs)


def _check_takes_compute_result(compute_metrics: Callable[..., Any]) -> None:
    if not accepts(compute_metrics, "compute_result"):
        raise ValueError(
            "batch_eval_metrics=True calls compute_metrics(prediction, compute_result=...) after every batch, but "
            f"{getattr(compute_metrics, '__qualname__', compute_metrics)!r} takes no argument compute_result. Add it: "
            "accumulate while it is False, return the metrics of the whole evaluation when it is True."
        )


def _as_dict(metrics: Any, when: str = "") -> dict[str, Any]:
    if not isinstance(metrics, Mapping):
        message = f"compute_metrics must {when}return a dict such as {{'accuracy': 0.9}}, but returned {metrics!r}."
        raise TypeError(message)
    return dict(metrics)
