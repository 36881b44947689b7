"""The evaluation loop: predict every batch, take what was asked for, then average the loss and compute metrics.

Owns: the order of these, and which parts an evaluation is made of, chosen once before the first batch. Leaves to
others: predicting one batch (`predict`), what becomes of it (`accumulator`, `batch_coalescing`), rows
(`prediction_store`, `batch_metrics`, `streaming`), averaging (`losses`), timing and logging. Nothing here reads from
the device before the last batch. A batch costs few calls: `tests/loop/test_evaluation_cost.py`. Source: seed 001
(`evaluation_loop`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from trainwright.data.batch_groups import in_groups
from trainwright.evaluation.accumulator import (
    AcrossProcesses,
    Collected,
    Collector,
    GatheringCollector,
    main_input_of,
    padded_gather,
)
from trainwright.evaluation.batch_coalescing import Runs
from trainwright.evaluation.batch_metrics import EachBatch, as_dict
from trainwright.evaluation.losses import weighted_mean
from trainwright.evaluation.metrics import prefixed
from trainwright.evaluation.prediction_store import KeptRows
from trainwright.evaluation.settings import LoopSettings
from trainwright.evaluation.spill import MemoryBudget
from trainwright.evaluation.streaming import StreamingMetrics
from trainwright.nested import Nested, denumpify_detensorize
from trainwright.outputs import EvalLoopOutput, EvalPrediction

Array = np.ndarray[Any, Any]
Predict = Callable[[Any], tuple[torch.Tensor | None, Nested, Nested]]


def run_evaluation(
    dataloader: Iterable[Any],
    settings: LoopSettings,
    *,
    predict_batch: Predict,
    compute_metrics: Callable[..., Any] | None = None,
    streaming: StreamingMetrics | None = None,
    preprocess_logits: Callable[[Nested, Nested], Nested] | None = None,
    gather: Callable[[Nested], Nested] | None = None,
    pad_across_processes: Callable[..., Nested] | None = None,
    gather_objects: Callable[[Any], list[Any]] | None = None,
    num_own_rows: Callable[[int], int] | None = None,
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
    pad_across_processes: called as (tensor, dim=1, pad_index=-100) before `gather`.
    gather_objects: one value of each process; num_own_rows: the rows of a batch that are not repeated from elsewhere.
    average_losses: losses (num_samples,), each sample's being the mean of its batch -> loss; instead of `loss_average`.
    num_samples_expected: length of the dataset, where known: what was gathered beyond it is cut off.
    prepare_inputs: moves the inputs that `include_inputs` keeps to the device, which gathering needs.
    order: asked after the last batch for the sample that each row is (num_samples,), where batches did not come in the
        order of the dataset: rows are returned in that order. None: they come as they were.
    budget: main memory that rows may take before they go to files.

    Raises ValueError before the first batch for a `compute_metrics` that cannot take compute_result but must, TypeError
    for one that returns no dict.
    """
    rows: KeptRows | EachBatch
    kept = KeptRows(settings.concat_batches, budget, settings.token_padding)
    if settings.batch_metrics:
        rows = EachBatch(compute_metrics, settings.include_losses, kept if settings.keep_predictions else None)
    else:
        rows = kept
    across_processes = None
    if gather is not None:
        across_processes = padded_gather(gather, pad_across_processes, gather_objects, num_own_rows)
    collector = _collector(
        settings, rows, main_input_of(main_input_name, prepare_inputs, settings), gather, across_processes
    )
    predict = _with_logits_seen(predict_batch, settings, preprocess_logits, streaming, across_processes)
    take = collector.add
    for inputs in in_groups(dataloader):
        loss, logits, labels = predict(inputs)
        take(inputs, loss, logits, labels)
        if after_batch is not None:
            after_batch()

    found = collector.collected(num_samples_expected if gather else None, order)
    if streaming is not None:
        metrics = streaming.compute()
    elif isinstance(rows, EachBatch):
        metrics = rows.compute()
    else:
        metrics = _metrics_of_all(found, settings, compute_metrics)
    if found.losses is not None and found.items is not None:
        average = average_losses(found.losses) if average_losses else weighted_mean(found.losses, found.items)
        metrics[f"{settings.metric_key_prefix}_loss"] = float(average)
    metrics = prefixed(denumpify_detensorize(metrics), settings.metric_key_prefix)
    num_samples = sum(found.num_rows) if num_samples_expected is None else num_samples_expected
    return EvalLoopOutput(found.predictions, found.label_ids, metrics, num_samples)


def _collector(
    settings: LoopSettings,
    rows: KeptRows | EachBatch,
    main_inputs: Callable[[Any], Nested] | None,
    gather: Callable[[Nested], Nested] | None,
    across_processes: AcrossProcesses | None,
) -> Collector | Runs:
    """What takes the batches: one process or several; in runs where nothing has to see a batch by itself."""
    if gather is not None and across_processes is not None:
        return GatheringCollector(settings, rows, main_inputs, gather=gather, across_processes=across_processes)
    collector = Collector(settings, rows, main_inputs)
    if isinstance(rows, EachBatch) or main_inputs is not None or not settings.concat_batches:
        return collector
    return Runs(collector, rows)


def _with_logits_seen(
    predict: Predict,
    settings: LoopSettings,
    preprocess: Callable[[Nested, Nested], Nested] | None,
    streaming: StreamingMetrics | None,
    across_processes: AcrossProcesses | None,
) -> Predict:
    """`predict`, whose logits are preprocessed and then counted by `streaming`; without logits where only the loss was
    asked for.
    """
    if streaming is not None:
        streaming.reset()
    if settings.prediction_loss_only or (preprocess is None and streaming is None):
        return predict

    def predict_and_look(inputs: Any) -> tuple[torch.Tensor | None, Nested, Nested]:
        loss, logits, labels = predict(inputs)
        if logits is not None and preprocess is not None:
            logits = preprocess(logits, labels)
        if streaming is not None and logits is not None and labels is not None:
            streaming.update(logits, labels, across_processes or _itself)
        return loss, logits, labels

    return predict_and_look


def _itself(tensors: Nested) -> Nested:
    return tensors


def _metrics_of_all(
    found: Collected, settings: LoopSettings, compute_metrics: Callable[..., Any] | None
) -> dict[str, Any]:
    """What `compute_metrics` makes of all rows; nothing where there are no predictions or no labels."""
    if compute_metrics is None or found.predictions is None or found.label_ids is None:
        return {}
    losses = found.losses_to_show(settings.concat_batches) if settings.include_losses else None
    return as_dict(compute_metrics(EvalPrediction(found.predictions, found.label_ids, found.inputs, losses)))
