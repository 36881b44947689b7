"""One evaluation: what it remembers from batch to batch, and its loop.

Owns: `Evaluation`, for the time of one `evaluate` or `predict`; the order of what happens to a batch, and which parts
that takes, chosen once before the first one. Leaves to others: predicting a batch (`predict`), adding it up
(`accumulator`), metrics (`batch_metrics`, `streaming`), the mean loss (`losses`), timing and logging. Nothing here
reads from the device before the last batch. A batch costs few calls: `tests/loop/test_evaluation_cost.py`. Source:
seed 001 (`evaluation_loop`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainwright.data.batch_groups import in_groups
from trainwright.data.eval_loader_cache import EvalLoaderCache
from trainwright.data.from_args import num_samples, sampled_order
from trainwright.evaluation.accumulator import Accumulated, Accumulator, LoopSettings, main_input_of
from trainwright.evaluation.batch_coalescing import CoalescingAccumulator
from trainwright.evaluation.batch_metrics import BatchMetrics, as_dict
from trainwright.evaluation.gathering import GatheringAccumulator, padded_gather, predict_without_repeats
from trainwright.evaluation.losses import weighted_mean
from trainwright.evaluation.metrics import prefixed
from trainwright.evaluation.shortcuts import NO_SHORTCUTS, Shortcuts
from trainwright.evaluation.spill import MemoryBudget
from trainwright.evaluation.streaming import StreamingMetrics, is_streaming, only_counts_labels
from trainwright.linear_loss.deferred import DeferredLogits
from trainwright.nested import Nested, denumpify_detensorize
from trainwright.outputs import EvalLoopOutput, EvalPrediction
from trainwright.techniques import precision

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from trainwright.args.training import TrainingArguments
    from trainwright.evaluation.packs import EvaluationPacks, PackedSet
    from trainwright.interop.model_facts import ModelFacts
    from trainwright.oom_retry import OomSafePrediction
    from trainwright.parallel.strategy import Strategy

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Predict = Callable[[Any], tuple[torch.Tensor | None, Nested, Nested]]
Metrics = Callable[..., Any]


@dataclass
class Evaluation:
    """One evaluation: of one data set, by `evaluate`, `predict`, or a call of `evaluation_loop` alone."""

    # Asked
    keep_predictions: bool = True  # also where the metrics need none: all but `evaluate` ask for them
    packed: PackedSet | None = None  # the data set in packs; None: each sample is a row
    # Found out
    in_parts: OomSafePrediction | None = None  # predicts batches that are too large for memory; None: an error passes
    # While batches are predicted
    dtype: torch.dtype | None = None  # of floating-point inputs, as of the weights (`*_full_eval`); None: as they are
    past: Any = None  # what the model returned for the next batch (`past_index`)

    def needs_logits(self, compute_metrics: Metrics | None, preprocess_logits: Any) -> bool:
        """Whether the logits of a batch are read all at once, and not label by label."""
        only_counts = compute_metrics is not None and only_counts_labels(compute_metrics)
        return self.keep_predictions or preprocess_logits is not None or not only_counts

    @contextlib.contextmanager
    def in_precision(self, args: TrainingArguments, model: nn.Module, is_in_train: bool) -> Iterator[None]:
        """Within the block, products, weights of `model` and floating-point inputs are as `args` ask (`*_full_eval`:
        outside training only).
        """
        dtype = None
        if not is_in_train and (args.fp16_full_eval or args.bf16_full_eval):
            dtype = torch.float16 if args.fp16_full_eval else torch.bfloat16
        with precision.float32_products(args.tf32), precision.half_weights(model, dtype):
            before, self.dtype = self.dtype, dtype
            try:
                yield
            finally:
                self.dtype = before

    def settings(
        self, args: TrainingArguments, compute_metrics: Metrics | None, *, loss_only: bool, **others: Any
    ) -> LoopSettings:
        """What is stored, as the arguments of a run ask. `others`: see `LoopSettings.of_run`."""
        streams = is_streaming(compute_metrics)
        return LoopSettings.of_run(
            args,
            loss_only=loss_only,
            keep_predictions=self.keep_predictions or not (streams or args.batch_eval_metrics),
            batch_metrics=args.batch_eval_metrics and not streams,
            **others,
        )

    def run(
        self,
        batches: Iterable[Any],
        settings: LoopSettings,
        predict_batch: Predict,
        strategy: Strategy,
        shortcuts: Shortcuts = NO_SHORTCUTS,
        *,
        compute_metrics: Metrics | None = None,
        preprocess_logits: Callable[[Nested, Nested], Nested] | None = None,
        average_losses: Callable[[Array], float] | None = None,
        after_batch: Callable[[], None] | None = None,
        num_samples: int | None = None,
        main_input_name: str = "input_ids",
        prepare_input: Callable[[Any], Any] | None = None,
    ) -> EvalLoopOutput:
        """Evaluate over `batches`, in all processes of `strategy` together.

        predict_batch: inputs -> (mean loss or None, logits or None, labels or None), on any device.
        compute_metrics: given an EvalPrediction once, where there are predictions and labels; with `batch_metrics` once
            per batch, with compute_result=True on the last one. Must return a dict. Or metrics that are counted batch
            by batch (`streaming`).
        preprocess_logits: (logits, labels) -> what to store instead of the logits.
        average_losses: losses (num_samples,), each sample's being the mean of its batch -> loss; instead of
            `loss_average`.
        num_samples: length of the dataset, where known: of several processes' rows those beyond it are cut off.
        prepare_input: moves the inputs that `include_inputs` stores to the device, which gathering needs.

        Rows come in the order of the dataset, also where batches did not. Raises ValueError before the first batch for
        a `compute_metrics` that cannot take compute_result but must, TypeError for one that returns no dict.
        """
        num_own = functools.partial(strategy.num_own_rows, dataloader=batches)
        to_all = padded_gather(strategy, num_own) if strategy.is_distributed else _itself
        streaming = None
        if is_streaming(compute_metrics):
            streaming, compute_metrics = _streaming(compute_metrics, settings, strategy, batches), None
        batch_metrics = BatchMetrics(compute_metrics) if settings.batch_metrics else None

        predict = predict_batch
        accumulator: Callable[..., Accumulator] = Accumulator
        if self.in_parts is not None:
            predict = functools.partial(self.in_parts.predict, predict_part=predict)
        if strategy.is_distributed:
            predict = functools.partial(predict_without_repeats, predict_batch=predict, num_own_rows=num_own)
            accumulator = functools.partial(
                GatheringAccumulator, gather=strategy.gather_for_metrics, across_processes=to_all
            )
        elif shortcuts.coalesce:
            accumulator = CoalescingAccumulator
        rows = accumulator(
            settings,
            main_inputs=main_input_of(main_input_name, prepare_input, settings),
            batch_metrics=batch_metrics,
            budget=MemoryBudget.of_run(settings.memory_budget_gib, settings.output_dir, strategy.num_processes_here),
        )

        add, preprocess, count = rows.add, preprocess_logits, streaming.update if streaming is not None else None
        if settings.prediction_loss_only:
            preprocess = count = None
        self.past = None
        try:
            for inputs in in_groups(batches):
                loss, logits, labels = predict(inputs)
                if preprocess is not None and logits is not None:
                    logits = preprocess(logits, labels)
                if count is not None and logits is not None and labels is not None:
                    count(logits, labels, to_all)
                    if isinstance(logits, DeferredLogits):  # whose chunks were counted: nothing else reads them
                        logits = None
                add(inputs, loss, logits, labels)
                if after_batch is not None:
                    after_batch()
        finally:
            self.past = None
        found = rows.result(num_samples if strategy.is_distributed else None, functools.partial(sampled_order, batches))

        if streaming is not None:
            metrics = streaming.compute()
        elif batch_metrics is not None:
            metrics = batch_metrics.compute()
        else:
            metrics = _metrics_of_all(found, settings, compute_metrics)
        if found.losses is not None and found.items is not None:
            average = average_losses(found.losses) if average_losses else weighted_mean(found.losses, found.items)
            metrics[f"{settings.metric_key_prefix}_loss"] = float(average)
        metrics = prefixed(denumpify_detensorize(metrics), settings.metric_key_prefix)
        return EvalLoopOutput(
            found.predictions, found.label_ids, metrics, sum(found.num_rows) if num_samples is None else num_samples
        )


class Evaluations:
    """Those of one Trainer: the one under way, which may be inside another, and what outlives it."""

    def __init__(self) -> None:
        self.current: Evaluation | None = None
        self.loaders = EvalLoaderCache()
        self.packs: EvaluationPacks | None = None  # of a run that packs, once one was asked for
        self.samples_at_once: int | None = None  # that fit into memory; None: no batch was too large yet
        self._past_of_training: Any = None

    @contextlib.contextmanager
    def one(
        self, args: TrainingArguments, facts: ModelFacts, label_names: Sequence[str], keep_predictions: bool
    ) -> Iterator[Evaluation]:
        """A new `Evaluation`, which is `current` within the block."""
        outer = self.current
        in_parts = outer.in_parts if outer is not None else None
        if in_parts is None and args.auto_find_batch_size:
            from trainwright.oom_retry import OomSafePrediction

            in_parts = OomSafePrediction(
                labels_are_shifted=facts.labels_are_shifted,
                label_names=label_names,
                batch_size=args.eval_batch_size,
                limit=self.samples_at_once,
            )
        self.current = evaluation = Evaluation(keep_predictions, in_parts=in_parts)
        try:
            yield evaluation
        finally:
            self.current = outer
            self._past_of_training = None  # the next training batch does not follow the one before the evaluation
            if in_parts is not None:
                self.samples_at_once = in_parts.num_samples

    @property
    def past(self) -> Any:
        """What the last batch handed on to the next (`past_index`): in the evaluation under way, else in training."""
        return self._past_of_training if self.current is None else self.current.past

    @past.setter
    def past(self, value: Any) -> None:
        if self.current is None:
            self._past_of_training = value
        else:
            self.current.past = value

    @property
    def input_dtype(self) -> torch.dtype | None:
        """See `Evaluation.dtype`."""
        return None if self.current is None else self.current.dtype


def announced(
    dataloader: DataLoader[Any], description: str, args: TrainingArguments, packed: PackedSet | None = None
) -> int | None:
    """Say what begins, and return how many rows it has; None where that is not known. ValueError for none."""
    found = num_samples(dataloader)
    if found == 0:
        raise ValueError(f"{description} of an empty data set: eval_dataset or test_dataset has no sample.")
    shown = "?" if found is None else found
    if packed is not None:
        text = "%s: %s samples in %s packs, batches of %s."
        logger.info(text, description, packed.num_samples, shown, packed.packs_per_batch)
    else:
        logger.info("%s: %s samples, batches of %s.", description, shown, args.eval_batch_size)
    return found


def _streaming(metrics: Any, settings: LoopSettings, strategy: Strategy, batches: Iterable[Any]) -> StreamingMetrics:
    together = strategy.is_distributed
    streaming = StreamingMetrics(
        metrics,
        device=strategy.device,
        labels_are_shifted=settings.labels_are_shifted,
        sum_over_processes=strategy.sum if together else None,
        without_repeats=functools.partial(strategy.without_repeats, dataloader=batches) if together else None,
    )
    streaming.reset()
    return streaming


def _itself(tensors: Nested) -> Nested:
    return tensors


def _metrics_of_all(found: Accumulated, settings: LoopSettings, compute_metrics: Metrics | None) -> dict[str, Any]:
    """What `compute_metrics` makes of all rows; nothing where there are no predictions or no labels."""
    if compute_metrics is None or found.predictions is None or found.label_ids is None:
        return {}
    losses = found.losses_to_show(settings.concat_batches) if settings.include_losses else None
    return as_dict(compute_metrics(EvalPrediction(found.predictions, found.label_ids, found.inputs, losses)))
