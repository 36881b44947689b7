"""Finding out before the first step that an evaluation would fail, or that the best model could never be chosen.

Owns: making one batch of the evaluation data; the checks of `metric_for_best_model`: against what is known without
running anything, then against the metrics of one batch. Leaves to others: when to rehearse (Trainer), the evaluation
itself (`loop`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from trainwright.data import own_generators
from trainwright.data.from_args import is_iterable, why_no_batch
from trainwright.data.samplers import has_length
from trainwright.names import SaveStrategy, SchedulerType, closest
from trainwright.outputs import EvalLoopOutput
from trainwright.seeding import generator_states, restore_generators

logger = logging.getLogger(__name__)

_ALWAYS_THERE = ("loss", "runtime", "samples_per_second", "steps_per_second")


def needs_metric(args: Any) -> bool:
    """Whether the run reads `metric_for_best_model` from its evaluations."""
    return (
        bool(args.metric_for_best_model)
        and args.eval_strategy != "no"
        and (
            bool(args.load_best_model_at_end)
            or args.save_strategy is SaveStrategy.BEST
            or args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        )
    )


def check_metric_name(args: Any, eval_dataset: Any, has_metrics: bool) -> None:
    """Raise ValueError for a metric that no evaluation of this run can return, as far as its name tells."""
    if not needs_metric(args):
        return
    name = args.metric_for_best_model.removeprefix("eval_")
    sets = list(eval_dataset) if isinstance(eval_dataset, dict) else []
    if sets and not any(name.startswith(f"{dataset}_") for dataset in sets):
        choices = [f"eval_{dataset}_loss" for dataset in sets]
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} must name one of the evaluation sets "
            f"{sets}, because each "
            f"has its own metrics: for example {choices[0]!r}.{closest(f'eval_{name}', choices)}"
        )
    if not has_metrics:
        known = [f"{dataset}_{metric}" for dataset in sets for metric in _ALWAYS_THERE] or list(_ALWAYS_THERE)
        if name not in known:
            raise ValueError(
                f"metric_for_best_model={args.metric_for_best_model!r}, but without compute_metrics an "
                "evaluation returns only "
                f"{[f'eval_{metric}' for metric in known]}.{closest(name, known)} Pass compute_metrics=, or "
                "choose one of these."
            )


def try_batch(loader: Any, args: Any, description: str) -> None:
    """Make one batch of an evaluation set as `loader` would, so that what cannot be collated is found before training.

    Raises ValueError where it cannot, and where a metric is needed and `dataloader_drop_last` leaves no batch. Costs
    the fetching of one batch; random states are restored. Streams, which may give each sample once, are left alone.
    """
    dataset, collator = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if dataset is None or collator is None or is_iterable(dataset) or not has_length(dataset) or not len(dataset):
        return
    nothing = why_no_batch(dataset, args, args.eval_batch_size)
    if nothing is not None:
        if needs_metric(args):
            name = args.metric_for_best_model
            raise ValueError(f"{description}: {nothing} metric_for_best_model={name!r} could not be computed.")
        return  # building the loader has warned of it
    if (args.dataloader_num_workers and args.world_size > 1) or own_generators.is_made_late(collator):
        return  # what a data set opens belongs into its workers; a generator of a collator would move on
    states = generator_states()
    try:
        if args.dataloader_num_workers:
            next(iter(loader))
        else:
            collator([dataset[number] for number in range(min(args.eval_batch_size, len(dataset)))])
    except Exception as error:
        raise ValueError(
            f"{description} cannot be made into batches, so the first evaluation would end the run: "
            f"{type(error).__name__}: {error}"
            + (
                " packing=True makes the training batches itself, and those of evaluation are made by data_collator: "
                "leave it out, or pass one that pads labels too, such as DataCollatorForSeq2Seq(tokenizer)."
                if args.packs
                else ""
            )
        ) from error
    finally:
        restore_generators(states)


def sets_with_metric(args: Any, eval_dataset: Any, compute_metrics: Any) -> Iterator[tuple[str | None, str]]:
    """(name or None, prefix) of the evaluation sets whose metrics may hold `metric_for_best_model`, so that it is worth
    looking; none where it is known without running anything, or where metrics need more than one batch.
    """
    name = args.metric_for_best_model
    if compute_metrics is None or args.batch_eval_metrics or name is None or name.removeprefix("eval_") == "loss":
        return
    if not isinstance(eval_dataset, dict):
        yield None, "eval"
        return
    for dataset in eval_dataset:
        if name.removeprefix("eval_").startswith(f"{dataset}_"):
            yield dataset, f"eval_{dataset}"


def rehearse(batches: Iterable[Any], evaluate: Callable[[Iterable[Any]], EvalLoopOutput], metric_name: str) -> None:
    """Evaluate one batch and look for `metric_name` among the metrics.

    Raises ValueError when it is missing. A `compute_metrics` that fails on one batch may still work on a whole set (a
    class may be missing), so that is only a warning.
    """
    try:
        metrics = evaluate(itertools.islice(batches, 1)).metrics or {}
    except Exception as error:
        logger.warning(
            "compute_metrics failed on one batch, tried before training: %s: %s. If it cannot work on the "
            "whole set either, "
            "the first evaluation will stop the run.",
            type(error).__name__,
            error,
        )
        return
    bare = metric_name.removeprefix("eval_")
    if not any(candidate in metrics for candidate in (f"eval_{bare}", bare)):
        raise ValueError(
            f"metric_for_best_model={metric_name!r} is not among the metrics of an evaluation: {sorted(metrics)}."
            f"{closest(f'eval_{bare}', metrics)} Return it from compute_metrics, or choose one of these."
        )
