"""How long a run is, worked out once before its first step.

Owns: `TrainingPlan` and the arithmetic of epochs, updates and samples. Leaves to others: building the data loader,
obeying the plan. Imports nothing heavy, so the arithmetic is tested without a model. Source: seed 001
(`num_train_epochs`, `max_steps`, `set_initial_training_values`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple


class TrainingPlan(NamedTuple):
    """What a run will do. An "update" is one optimizer step, made of up to `gradient_accumulation_steps`
    micro-batches. A tuple, which is what `Trainer.set_initial_training_values` is documented to return.
    """

    num_train_epochs: int  # passes over the data that are started; the last may be cut short
    num_update_steps_per_epoch: int  # updates in a whole pass
    num_examples: int  # samples in a pass
    num_train_samples: int  # samples the run goes through, for samples per second
    epoch_based: bool  # the length was given in epochs, not in steps
    len_dataloader: int | None  # micro-batches in a pass; None when the loader has no length
    max_steps: int  # updates of the whole run

    @classmethod
    def of(cls, values: Iterable[Any]) -> TrainingPlan:
        """`values`, which is a plan, or the plain tuple that an override returns."""
        return values if isinstance(values, cls) else cls(*values)


def plan_training(
    *,
    len_dataloader: int | None,
    num_examples: int | None,
    total_train_batch_size: int,
    gradient_accumulation_steps: int,
    num_train_epochs: float,
    max_steps: int,
) -> TrainingPlan:
    """Work out the plan. A positive `max_steps` wins over `num_train_epochs`.

    `total_train_batch_size` is samples per update over all processes. A loader without length needs `max_steps`, and
    counts as one pass that never ends.

    Raises ValueError when the length of the run cannot be known, or when there is nothing to train on.
    """
    if len_dataloader is None:
        if max_steps <= 0:
            raise ValueError(
                "max_steps must be positive when the training data has no length (an IterableDataset without __len__): "
                f"num_train_epochs={num_train_epochs} cannot be turned into steps. Pass "
                "TrainingArguments(max_steps=...)."
            )
        num_samples = total_train_batch_size * max_steps
        return TrainingPlan(sys.maxsize, max_steps, num_samples, num_samples, False, None, max_steps)
    if len_dataloader == 0:
        raise ValueError(
            "The training data holds no batch: train_dataset is empty, or dataloader_drop_last=True drops its "
            "only, incomplete batch."
        )
    per_epoch = -(-len_dataloader // gradient_accumulation_steps)  # ceil: the last, shorter group is an update too
    samples_per_epoch = num_examples if num_examples is not None else per_epoch * total_train_batch_size
    if max_steps > 0:
        return TrainingPlan(
            num_train_epochs=-(-max_steps // per_epoch),
            num_update_steps_per_epoch=per_epoch,
            num_examples=samples_per_epoch,
            num_train_samples=max_steps * total_train_batch_size,
            epoch_based=False,
            len_dataloader=len_dataloader,
            max_steps=max_steps,
        )
    return TrainingPlan(
        num_train_epochs=math.ceil(num_train_epochs),
        num_update_steps_per_epoch=per_epoch,
        num_examples=samples_per_epoch,
        num_train_samples=int(samples_per_epoch * num_train_epochs),
        epoch_based=True,
        len_dataloader=len_dataloader,
        # Rounded first: 1.1 epochs of 100 updates are 110.00000000000001 in binary, and must not become 111.
        max_steps=math.ceil(round(num_train_epochs * per_epoch, 6)),
    )
