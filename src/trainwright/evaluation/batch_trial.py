"""Finding out before the first step that an evaluation set cannot be made into batches.

Owns: making one batch of an evaluation set. Leaves to others: when (Trainer), and what is computed from it.
"""

from __future__ import annotations

from typing import Any

from trainwright.data import collator_rng
from trainwright.data.from_args import is_iterable, why_no_batch
from trainwright.data.samplers import has_length
from trainwright.evaluation.sanity_check import needs_metric
from trainwright.seeding import RngState


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
    if (args.dataloader_num_workers and args.world_size > 1) or collator_rng.is_made_late(collator):
        return  # what a data set opens belongs into its workers; a generator of a collator would move on
    rng = RngState.capture()
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
        rng.restore()
