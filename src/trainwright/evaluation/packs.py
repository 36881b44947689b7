"""Evaluation sets of a run that packs: in packs too, where nothing needs the rows of single samples.

Owns: which evaluations pack, why others do not, the plan of each set. Leaves to others: packs and their
batches (data/packing_from_args), metrics that are counted label by label (`trainwright.metrics`), the loop (`run`).

A packed evaluation has the loss of the unpacked one: the mean over labels, each predicted from its sample alone. So
samples are never cut, and whatever could make it another number (a loss that is no mean over labels, an average of
batches) is evaluated with a row for each sample.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainwright.data.collate_packing import DataCollatorForPacking
from trainwright.data.from_args import accelerator_config_of, is_iterable
from trainwright.data.lengths import sample_lengths
from trainwright.data.packed_dataset import PackedDataset, token_columns
from trainwright.data.packing import ALONE, plan_packs
from trainwright.data.packing_from_args import (
    PACKED_COLUMNS,
    check_separation,
    laid_out,
    most_positions,
    refused_columns,
    token_table,
)
from trainwright.evaluation.streaming import is_streaming, named_metrics
from trainwright.interop.loaded import is_hf_dataset
from trainwright.interop.packed_checks import SHORTEST_PACK, loss_is_no_mean
from trainwright.metrics import counts_labels
from trainwright.seeding import RngState

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments
    from trainwright.interop.packed_attention import PackedInputs

logger = logging.getLogger(__name__)

# Hooks that may look at the rows of a batch as samples, or compute a loss that is no mean over labels.
SEES_ROWS = ("prediction_step", "evaluation_loop", "prediction_loop", "compute_loss", "average_eval_losses")
MOST_REMEMBERED = 8  # evaluation sets


@dataclass(frozen=True)
class PackedSet:
    """An evaluation set in packs."""

    dataset: PackedDataset
    packs_per_batch: int
    num_samples: int


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation is made of, as far as packing depends on it."""

    args: TrainingArguments
    model: nn.Module
    data_collator: Any
    processing_class: Any
    compute_metrics: Any
    preprocess_logits: Any
    has_own_loss: bool  # `compute_loss_func`
    is_overridden: Callable[[str], bool]
    prepare: Callable[[Any], Any]  # puts a batch on the device, with the `PackedInputs` that `adopt` was given
    adopt: Callable[[PackedInputs | None], None]


class EvaluationPacks:
    """The evaluation sets of one Trainer in packs, each planned once."""

    def __init__(self) -> None:
        self._sets: list[tuple[Any, int, PackedSet | str]] = []  # data set, its length, what came of it
        self._told: set[str] = set()

    def find(self, dataset: Any, asked: Evaluated, inputs: PackedInputs | None) -> PackedSet | None:
        """`dataset` in packs; None where each sample is to be a row, which a log line explains once.

        `inputs`: of the training that packs, None: there was none yet. Reads every sample once, for its length.
        """
        reason = why_rows(asked) or self._why_not_together(dataset, asked)
        found: PackedSet | str = reason if reason is not None else self._of(dataset, asked, inputs)
        if isinstance(found, PackedSet):
            return found
        if found not in self._told:
            self._told.add(found)
            logger.info("packing: this evaluation has a row for each sample: %s.", found)
        return None

    @staticmethod
    def _why_not_together(dataset: Any, asked: Evaluated) -> str | None:
        if is_iterable(dataset):
            return "the samples of a stream cannot be looked at in advance"
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) == 0:
            return "the data set has no samples by index"
        return None

    def _of(self, dataset: Any, asked: Evaluated, inputs: PackedInputs | None) -> PackedSet | str:
        for known, length, found in self._sets:
            if known is dataset and length == len(dataset):
                return found
        try:
            found = _packed_set(dataset, asked, inputs)
        except ValueError as error:
            found = str(error).rstrip(".")
        except Exception as error:  # if it is the data set's own, the rows of this evaluation will show it
            found = f"{type(error).__name__}: {error}"
        self._sets = [*self._sets[1 - MOST_REMEMBERED :], (dataset, len(dataset), found)]
        return found


def why_rows(asked: Evaluated) -> str | None:
    """What needs a row for each sample in this evaluation, in words; None: nothing."""
    args = asked.args
    metrics = None if args.prediction_loss_only else asked.compute_metrics
    if metrics is not None and not is_streaming(metrics):
        return "compute_metrics is given predictions by sample; metrics that count labels, such as Accuracy, are not"
    if metrics is not None and asked.preprocess_logits is not None:
        return "preprocess_logits_for_metrics sees the logits of each batch"
    if metrics is not None:
        others = [name for name, metric in named_metrics(metrics).items() if not counts_labels(metric)]
        if others:
            return f"the metrics {others} may see more of a sample than its labels"
    if args.eval_loss_average != "items":
        return f"eval_loss_average={args.eval_loss_average!r} is a mean over batches of samples"
    if asked.has_own_loss:
        return "compute_loss_func need not be a mean over labels"
    overridden = [name for name in SEES_ROWS if asked.is_overridden(name)]
    if overridden:
        return f"{overridden[0]} is overridden and may see the rows of a batch as samples"
    if args.eval_sampling_strategy not in (None, "sequential"):
        return f"eval_sampling_strategy={args.eval_sampling_strategy!r} orders samples"
    if args.dataloader_drop_last:
        return "dataloader_drop_last=True leaves out samples by batches of samples"
    if args.jit_mode_eval:
        return "jit_mode_eval traces the model on one batch"
    return None


def _packed_set(dataset: Any, asked: Evaluated, inputs: PackedInputs | None) -> PackedSet:
    """Raises ValueError, with the reason, for samples and models whose losses are not the same in packs."""
    args, model = asked.args, asked.model
    collator, made = laid_out(
        args, model=model, data_collator=asked.data_collator, processing_class=asked.processing_class, is_stream=False
    )
    accelerator = accelerator_config_of(args)
    is_shared_out = (
        args.n_gpu > 1 or accelerator.split_batches or (args.world_size > 1 and accelerator.dispatch_batches)
    )
    if collator.is_one_row and is_shared_out:
        raise ValueError("a batch of one row cannot be shared out over devices")
    refused = refused_columns(model)
    lengths = _lengths(dataset, args, refused)
    longest, most = int(lengths.max()), most_positions(model)
    if most is not None and longest > most:
        raise ValueError(f"a sample has {longest} tokens, and the model positions for {most}")
    if inputs is None:  # an evaluation before any training
        asked.adopt(made)
        try:
            check_separation(model, made, collator, asked.prepare)
        except ValueError:
            asked.adopt(None)
            raise
        inputs = made
    _check_loss(asked, inputs, collator)
    plan = plan_packs(lengths, collator.packing_length, long_samples=ALONE)
    # No more tokens at once than that many samples have without padding, but for a single pack.
    size = max(1, int(args.eval_batch_size * plan.num_tokens / len(lengths) / collator.packing_length))
    if collator.is_one_row and args.world_size > 1:
        size = 1  # what is left out of the last round is counted in rows
    packs = PackedDataset(token_table(dataset, refused), plan, refused, collate_whole=collator)
    return PackedSet(packs, size, len(lengths))


def _lengths(dataset: Any, args: TrainingArguments, refused: frozenset[str]) -> torch.Tensor:
    """Tokens of each sample. Raises ValueError where one cannot be joined with others."""
    if is_hf_dataset(dataset) and dataset.format["type"] is None and "input_ids" in dataset.column_names:
        taken = sorted(refused & set(dataset.column_names))
        if taken:
            raise ValueError(f"the samples also have {taken}, which the model takes and which cannot be joined")
        table = dataset.select_columns([name for name in dataset.column_names if name in PACKED_COLUMNS])
        lengths = sample_lengths(dataset, model_input_name="input_ids")
        _check_table(table)
        return lengths
    if args.dataloader_num_workers:  # they make samples faster; a few are looked at here
        rng = RngState.capture()
        for number in range(min(args.eval_batch_size, len(dataset))):
            token_columns(dataset[number], number, refused)
        rng.restore()
        return sample_lengths(dataset, model_input_name="input_ids", num_workers=args.dataloader_num_workers)
    rng = RngState.capture()  # random transforms draw
    try:
        found = (token_columns(dataset[number], number, refused)["input_ids"] for number in range(len(dataset)))
        return torch.tensor([len(tokens) for tokens in found], dtype=torch.int64)
    finally:
        rng.restore()


def _check_table(table: Any) -> None:
    """As `token_columns`, for all rows of a `datasets.Dataset` and without reading a token more than once."""
    import pyarrow.compute as compute

    for batch in table.with_format("arrow").iter(batch_size=10_000):
        names = batch.column_names
        sizes = compute.list_value_length(batch.column("input_ids"))
        if "labels" in names:
            of_labels = compute.list_value_length(batch.column("labels"))
            if of_labels.null_count or not compute.all(compute.equal(sizes, of_labels)).as_py():
                raise ValueError("not every sample has one label per token")
        if "attention_mask" in names:
            smallest = compute.min(compute.list_flatten(batch.column("attention_mask"))).as_py()
            if smallest is not None and smallest < 1:
                raise ValueError("some samples are padded already (their attention_mask has zeros)")


def _check_loss(asked: Evaluated, inputs: PackedInputs, collator: DataCollatorForPacking) -> None:
    """Raise ValueError where the loss of a pack is not the mean over its labels, of small packs as a trial."""
    if inputs.loss_is_mean is None:
        small = copy.copy(collator)
        small.packing_length = SHORTEST_PACK
        small.copies_labels, small.ignored_label = False, None  # of the tokens that are tried, each is a label

        def make_batch(packs: list[list[list[int]]]) -> Any:
            samples = [[{"input_ids": np.array(tokens)} for tokens in pack] for pack in packs]
            return asked.prepare(small(samples))

        with inputs.while_packed(asked.model):
            inputs.loss_is_mean = not loss_is_no_mean(asked.model, make_batch)
    if not inputs.loss_is_mean:
        raise ValueError("the loss of a pack is not the mean over its labels in a trial")
