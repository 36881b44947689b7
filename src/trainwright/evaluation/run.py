"""One evaluation, as the arguments of a run ask for it.

Owns: translating arguments, processes and metrics into what the loop is told. Leaves to others: the loop (`loop`), the
hooks that predict a batch and prepare its inputs (Trainer).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from trainwright.data.from_args import sampled_order
from trainwright.evaluation.loop import run_evaluation
from trainwright.evaluation.settings import LoopSettings
from trainwright.evaluation.spill import MemoryBudget
from trainwright.evaluation.streaming import StreamingMetrics, is_streaming
from trainwright.outputs import EvalLoopOutput
from trainwright.parallel.strategy import Strategy


def evaluate(
    batches: Any,
    args: Any,
    strategy: Strategy,
    predict: Callable[[Any], tuple[Any, Any, Any]],
    compute_metrics: Any,
    *,
    loss_only: bool,
    keeps_predictions: bool,
    labels_are_shifted: bool,
    label_names: tuple[str, ...],
    metric_key_prefix: str,
    token_padding: int | None = None,
    **for_loop: Any,
) -> EvalLoopOutput:
    """Evaluate over `batches` as `args` (TrainingArguments) ask, in all processes of the run together.

    predict: inputs -> (loss, logits, labels). compute_metrics: the user's function, or metrics that are counted batch
    by batch. keeps_predictions: also where these need none. for_loop: see `loop.run_evaluation`.
    """
    streams, together = is_streaming(compute_metrics), strategy.is_distributed
    settings = LoopSettings(
        prediction_loss_only=loss_only,
        accumulation_steps=args.eval_accumulation_steps,
        concat_batches=args.eval_do_concat_batches,
        include_inputs="inputs" in args.include_for_metrics,
        include_losses="loss" in args.include_for_metrics,
        keep_predictions=keeps_predictions or not (streams or args.batch_eval_metrics),
        batch_metrics=args.batch_eval_metrics and not streams,
        loss_average=args.eval_loss_average,
        labels_are_shifted=labels_are_shifted,
        label_names=label_names,
        token_padding=token_padding,
        metric_key_prefix=metric_key_prefix,
    )
    streaming = None
    if streams:
        streaming = StreamingMetrics(
            compute_metrics,
            device=strategy.device,
            labels_are_shifted=labels_are_shifted,
            sum_over_processes=strategy.sum if together else None,
            without_repeats=functools.partial(strategy.without_repeats, dataloader=batches) if together else None,
        )
    num_own = functools.partial(strategy.num_own_rows, dataloader=batches)
    if together:
        from trainwright.evaluation.padding_samples import predict_own_rows

        predict = functools.partial(predict_own_rows, predict_batch=predict, num_own=num_own)
    return run_evaluation(
        batches,
        settings,
        predict_batch=predict,
        compute_metrics=None if streams else compute_metrics,
        streaming=streaming,
        gather=strategy.gather_for_metrics if together else None,
        pad_across_processes=strategy.pad_across_processes if together else None,
        gather_objects=strategy.gather_objects if together else None,
        num_own_rows=num_own,
        order=functools.partial(sampled_order, batches),
        budget=MemoryBudget.of_run(args.eval_memory_budget_gib, str(args.output_dir), strategy.num_processes_here),
        **for_loop,
    )
