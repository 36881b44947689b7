"""The data of an update: batch sizes, accumulation, workers, order and columns.

Owns: the fields and their ranges. Leaves to others: building loaders and samplers (`data/`).
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import ClassVar

from trainwright.args.checks import check_choice, check_number, check_switch
from trainwright.args.options import option
from trainwright.args.run import RunArguments

START_METHODS = ("fork", "spawn", "forkserver")
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")
LONG_SAMPLES = ("split", "truncate", "error")


@dataclass
class BatchArguments(RunArguments):
    """Batches: sizes, accumulation, data loading."""

    # False where a program for `transformers` derives its arguments, from `compat/installed_defaults`.
    _is_written_for_us: ClassVar[bool] = True

    per_device_train_batch_size: int = option(
        8, "Samples per device in one micro-batch of training. The main lever on memory."
    )
    per_device_eval_batch_size: int = option(8, "Samples per device in one batch of evaluation or prediction.")
    per_gpu_train_batch_size: int | None = option(None, "Older name of per_device_train_batch_size.")
    per_gpu_eval_batch_size: int | None = option(None, "Older name of per_device_eval_batch_size.")
    gradient_accumulation_steps: int = option(
        1, "Micro-batches per update. The weights move as if the batch were that many times larger, in the same memory."
    )
    auto_find_batch_size: bool = option(
        False, "When memory runs out, retry the step with smaller micro-batches and more accumulation."
    )
    average_tokens_across_devices: bool | None = option(
        True, "Divide the loss by the number of label tokens on all devices, so that every token weighs the same."
    )
    train_sampling_strategy: str = option(
        "random",
        "Order of the training data: 'random', 'sequential', 'group_by_length', which puts samples of similar length "
        "into one batch and so wastes little on padding, or 'batch_rebalance', which splits each update's samples into "
        "micro-batches of unequal size and like cost.",
        choices=SAMPLING_STRATEGIES,
    )
    group_by_length: bool = option(
        False, "The same as train_sampling_strategy='group_by_length'; the two always agree."
    )
    length_column_name: str | None = option(
        "length",
        "Column that already holds each sample's length; without it, grouping by length reads every sample once.",
    )
    packing: bool = option(
        False,
        "Join tokenised training samples into sequences of packing_length tokens, so that next to nothing is padding. "
        "Samples do not attend to each other. A pack then counts as one sample: in batch sizes, epochs and positions.",
        extension=True,
    )
    packing_length: int | None = option(
        None,
        "Tokens in a pack. None: the longest input of model and tokenizer, at most 2048. Needs packing.",
        extension=True,
    )
    packing_long_samples: str = option(
        "split",
        "What to do with samples longer than packing_length: 'split' cuts them into several that do not attend to "
        "each other, 'truncate' keeps their beginning, 'error' refuses them. Needs packing.",
        extension=True,
    )
    remove_unused_columns: bool | None = option(
        True, "Drop the columns of a dataset that the model's `forward` has no argument for."
    )
    label_names: list[str] | None = option(
        None, "Names of the inputs that are labels. Without it: the arguments of `forward` with 'label' in their name."
    )
    dataloader_drop_last: bool = option(
        False, "Leave out the last batch of an epoch where it is smaller than the others."
    )
    dataloader_num_workers: int = option(
        0, "Processes that load data, per training process. 0: loaded between the steps, in the training process."
    )
    dataloader_prefetch_factor: int | None = option(
        None,
        "Batches each worker prepares ahead. Needs workers. None: 2, or its share of one update where that is more.",
    )
    dataloader_persistent_workers: bool = option(
        False,
        "Keep the workers from one epoch to the next: no start-up time, but their memory stays in use. Needs workers.",
    )
    dataloader_multiprocessing_context: str | None = option(
        None,
        "How workers are started: 'fork', 'spawn' or 'forkserver'. None: the system's default. Needs workers.",
        choices=START_METHODS,
    )
    dataloader_in_order: bool = option(
        True,
        "Return batches in order although workers finish out of order. False is faster with uneven samples, not "
        "repeatable.",
    )
    dataloader_pin_memory: bool = option(
        True, "Load batches into page-locked memory, from which copies to a GPU are faster."
    )

    def _check_batches(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_number(self, name, 1, whole=True)
        for name in ("per_gpu_train_batch_size", "per_gpu_eval_batch_size"):
            check_number(self, name, 1, whole=True, optional=True)
        check_number(self, "dataloader_num_workers", 0, whole=True)
        check_number(self, "dataloader_prefetch_factor", 1, whole=True, optional=True)
        if isinstance(self.label_names, str):
            raise TypeError(
                f"label_names={self.label_names!r} must be a list of names, such as [{self.label_names!r}]."
            )
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        check_choice(self, "train_sampling_strategy", SAMPLING_STRATEGIES)
        self.group_by_length = self.train_sampling_strategy == "group_by_length"
        self._check_packing()
        if self.dataloader_multiprocessing_context is not None:
            check_choice(self, "dataloader_multiprocessing_context", START_METHODS)
        if self.dataloader_num_workers == 0:
            for name in (
                "dataloader_prefetch_factor",
                "dataloader_persistent_workers",
                "dataloader_multiprocessing_context",
            ):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs loader processes, but dataloader_num_workers=0: "
                        f"set dataloader_num_workers to 1 or more, or leave {name} out."
                    )

    @property
    def packs(self) -> bool:
        """Whether the Trainer packs. TRL's arguments define their own `packing`, because its trainers pack themselves;
        so may those of any program written for another Trainer.
        """
        owner = next(base for base in type(self).__mro__ if "packing" in inspect.get_annotations(base))
        package = owner.__module__.partition(".")[0]
        return bool(self.packing) and package != "trl" and (self._is_written_for_us or package == "trainwright")

    def _check_packing(self) -> None:
        if self.packing and not self.packs:
            return
        check_switch(self, "packing")
        check_number(self, "packing_length", 2, whole=True, optional=True)
        check_choice(self, "packing_long_samples", LONG_SAMPLES)
        if not self.packing:
            for name, default in (("packing_length", None), ("packing_long_samples", "split")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect with packing=False: set packing=True, or leave "
                        f"{name} out."
                    )
        elif self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            older = " (group_by_length=True)" if self.train_sampling_strategy == "group_by_length" else ""
            raise ValueError(
                "packing=True makes all sequences equally long, and train_sampling_strategy="
                f"{self.train_sampling_strategy!r}{older} orders them by length. Choose one of the two; packing wastes "
                "less."
            )
