"""Training data packed as a run's arguments ask for it (`packing=True`).

Owns: reading `args`, what contradicts packing. Leaves to others: plans (packing), packs (packed_dataset), batches
(collate_packing), what a model needs (interop/packed_attention).
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from trainwright.data.collate_packing import DataCollatorForPacking
from trainwright.data.from_args import accelerator_config_of, check_indexable, data_seed, is_iterable
from trainwright.data.lengths import remembered, sample_lengths
from trainwright.data.packed_dataset import PackedDataset, PackedStream
from trainwright.data.packing import PackingPlan, plan_packs
from trainwright.interop.loaded import is_hf_dataset
from trainwright.interop.models import base_model_of
from trainwright.interop.packed_attention import PackedInputs, first_position, packed_inputs
from trainwright.interop.packed_checks import SHORTEST_PACK, leaks_across_samples

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

MOST_BY_DEFAULT = 2048  # tokens; models of today name limits of 100,000 and more, which no one means to fill
PACKED_COLUMNS = frozenset({"input_ids", "labels", "attention_mask"})
TRIED_PADDING = 5  # places of the pack that is tried before the first step
SETTINGS = ("packing", "packing_length", "packing_long_samples")  # with others a pack holds other samples

# What collators that may be replaced do: pad, and perhaps make labels of the tokens.
PADDING_COLLATORS = (
    "default_data_collator",
    "torch_default_data_collator",
    "DefaultDataCollator",
    "DataCollatorWithPadding",
    "DataCollatorWithFlattening",
    "DataCollatorForSeq2Seq",
    "DataCollatorForTokenClassification",
    "DataCollatorForUnpacked",
)
LANGUAGE_COLLATOR = "DataCollatorForLanguageModeling"


def packed(
    dataset: Any, args: TrainingArguments, *, model: nn.Module, data_collator: Any, processing_class: Any
) -> tuple[Any, DataCollatorForPacking, PackedInputs]:
    """`(packed data set, its collator, what a batch needs on the device)`.

    Raises ValueError for a model, collator or setting that packing contradicts, before a sample is read.
    """
    collator, inputs = laid_out(
        args,
        model=model,
        data_collator=data_collator,
        processing_class=processing_class,
        is_stream=is_iterable(dataset),
    )
    length, first, most = collator.packing_length, collator.first_position, most_positions(model)
    _check_settings(args, is_one_row=collator.is_one_row, is_stream=is_iterable(dataset))
    refused = refused_columns(model)
    options: dict[str, Any] = {"long_samples": args.packing_long_samples, "seed": data_seed(args)}
    if is_iterable(dataset):
        return PackedStream(dataset, length, refused=refused, **options), collator, inputs
    check_indexable(dataset)
    plan = _plan(dataset, args, length, options)
    longest = int((plan.ends - plan.begins).max())
    if isinstance(most, int) and longest > most:
        raise ValueError(
            f"packing_length={length} lets samples of {longest} tokens through, and the model has positions for {most} "
            f"(max_position_embeddings{f' without the first {first}' if first else ''}). Set packing_length to at most "
            f"{most}."
        )
    return PackedDataset(token_table(dataset, refused), plan, refused), collator, inputs


def laid_out(
    args: TrainingArguments, *, model: nn.Module, data_collator: Any, processing_class: Any, is_stream: bool
) -> tuple[DataCollatorForPacking, PackedInputs]:
    """How packs become batches for this model. Raises ValueError for a model or a collator that cannot be packed."""
    length = args.packing_length or _default_length(most_positions(model), processing_class)
    inputs = packed_inputs(model, length)
    collator = DataCollatorForPacking(
        length,
        inputs.names,
        pad_token_id=getattr(processing_class, "pad_token_id", None) or 0,
        names_lengths=not _is_dispatched(args, is_stream),  # which joins tensors and nothing else
        first_position=first_position(model),
        **_label_rules(data_collator),
    )
    return collator, inputs


def most_positions(model: nn.Module) -> int | None:
    """The tokens of the longest sample that the model has positions for, where it says so."""
    most = getattr(getattr(base_model_of(model), "config", None), "max_position_embeddings", None)
    return most - first_position(model) if isinstance(most, int) else None


def refused_columns(model: nn.Module) -> frozenset[str]:
    """Columns that samples must not have: the model takes them, and they cannot be joined."""
    return frozenset(inspect.signature(base_model_of(model).forward).parameters) - PACKED_COLUMNS


def token_table(dataset: Any, refused: frozenset[str]) -> Any:
    """A `datasets.Dataset` that is not transformed without the columns that are not read, as arrays; others as they
    are."""
    if is_hf_dataset(dataset) and "input_ids" in dataset.column_names and dataset.format["type"] is None:
        wanted = PACKED_COLUMNS | refused  # a refused one is left to be named in the error
        return dataset.select_columns([name for name in dataset.column_names if name in wanted]).with_format("numpy")
    return dataset


def _default_length(most_positions: Any, processing_class: Any) -> int:
    known = (most_positions, getattr(processing_class, "model_max_length", None))
    return min([MOST_BY_DEFAULT, *(limit for limit in known if isinstance(limit, int) and limit > 1)])


def _label_rules(data_collator: Any) -> dict[str, Any]:
    """How the collator that packing replaces makes labels. Raises ValueError for one that does more than that."""
    name = getattr(data_collator, "__name__", type(data_collator).__name__)
    if name in PADDING_COLLATORS:
        return {}
    if name == LANGUAGE_COLLATOR and not data_collator.mlm:
        return {"copies_labels": True, "ignored_label": getattr(data_collator.tokenizer, "pad_token_id", None)}
    known = [*PADDING_COLLATORS[3:-1], f"{LANGUAGE_COLLATOR}(mlm=False)"]
    what = "masks tokens" if name == LANGUAGE_COLLATOR else "is not known to do no more than pad"
    raise ValueError(
        f"packing=True makes the batches itself, so data_collator={name} would not be used for training, and it "
        f"{what}. Leave data_collator out, pass one of {known}, do its work when the "
        "data set is tokenised, or set packing=False."
    )


def _check_settings(args: TrainingArguments, *, is_one_row: bool, is_stream: bool) -> None:
    if args.past_index >= 0:
        raise ValueError(
            f"past_index={args.past_index} carries a state from one batch to the next, and packing=True puts unrelated "
            "samples there. Choose one of the two."
        )
    if not is_one_row:
        return
    if args.n_gpu > 1 or accelerator_config_of(args).split_batches or _is_dispatched(args, is_stream):
        raise ValueError(
            "packing=True gives this model each batch as one row (it takes offsets of samples), and a row cannot be "
            "shared out over devices. Start one process per device with torchrun, and leave split_batches and "
            "dispatch_batches of accelerator_config at False."
        )


def _is_dispatched(args: TrainingArguments, is_stream: bool) -> bool:
    """Whether one process reads for all of them."""
    dispatches = accelerator_config_of(args).dispatch_batches
    return bool(args.world_size > 1 and (is_stream if dispatches is None else dispatches))


def _plan(dataset: Any, args: TrainingArguments, length: int, options: dict[str, Any]) -> PackingPlan:
    def make() -> PackingPlan:
        lengths = sample_lengths(
            dataset,
            length_column_name=args.length_column_name,
            model_input_name="input_ids",
            num_workers=args.dataloader_num_workers,
        )
        plan = plan_packs(lengths, length, **options)
        logger.info(
            "packing: %d samples of %d tokens in %d packs of %d; %.2f %% of them is padding.",
            len(lengths),
            plan.num_tokens,
            len(plan),
            length,
            100 * plan.waste,
        )
        return plan

    return remembered(dataset, ("packs", length, args.length_column_name, *options.values()), make)


def check_packed(
    args: TrainingArguments,
    dataloader: Any,
    model: nn.Module,
    inputs: PackedInputs | None,
    prepare: Callable[[Any], Any],
) -> None:
    """Find, before the first step, what `packing=True` cannot be trained with. Raises ValueError.

    A loader that the user built, whose data are not packed; and a model that is given which samples belong together and
    ignores it. `inputs`: as `packed` gave them; how attention is computed is chosen here. `prepare`: puts a batch
    on the device, as a step does.
    """
    if not args.packs:
        return
    part = getattr(dataloader, "dataset", None)
    while part is not None and not isinstance(part, (PackedDataset, PackedStream)):
        part = getattr(part, "__dict__", {}).get("dataset")
    if part is None:
        raise ValueError(
            "packing=True packs what get_train_dataloader loads, but that is overridden and returns a loader of its "
            "own. Call super().get_train_dataloader() there, or set packing=False and pack in your loader."
        )
    collator = getattr(dataloader, "collate_fn", None)
    if not isinstance(collator, DataCollatorForPacking) or inputs is None:
        return

    check_separation(model, inputs, collator, prepare)


def check_separation(
    model: nn.Module, inputs: PackedInputs, collator: DataCollatorForPacking, prepare: Callable[[Any], Any]
) -> None:
    """Choose how attention is computed, and raise ValueError for a model that is given which samples belong together
    and ignores it. Costs some forward passes of one small pack: those of a whole one would make its logits."""
    small = copy.copy(collator)
    small.packing_length = min(collator.packing_length, SHORTEST_PACK + TRIED_PADDING)

    def make_batch(samples: list[list[int]]) -> Any:
        return prepare(small([[{"input_ids": np.array(tokens)} for tokens in samples]]))

    inputs.choose(model, make_batch, collator.packing_length)
    if collator.packing_length < SHORTEST_PACK:
        return
    with inputs.while_packed(model):
        sees_others = leaks_across_samples(model, make_batch)
    if sees_others:
        name = type(base_model_of(model)).__name__
        raise ValueError(
            f"packing=True: {name} lets the samples of a pack see each other. What it says of a sample changed with "
            f"the tokens of the one before it, although it was given {list(collator.names)}. Have forward keep them "
            "apart, or set packing=False."
        )
    inputs.check_equal_to_alone(model, make_batch)


def check_resumed(args: TrainingArguments, saved: Mapping[str, Any]) -> None:
    """Raise ValueError where a run stopped within an epoch whose packs are others now: its position means nothing.

    `saved`: a `LoopState`.
    """
    if not saved["position"]["samples_in_epoch"] or args.ignore_data_skip:
        return
    then = saved.get("arguments") or {}
    for name in SETTINGS:
        if name in then and then[name] != getattr(args, name):
            raise ValueError(
                f"The checkpoint was made within an epoch with {name}={then[name]!r}, and now "
                f"{name}={getattr(args, name)!r}: its place in the data, counted in packs, is lost. Resume with the "
                "old value, from the end of an epoch, or with ignore_data_skip=True, which starts the epoch anew."
            )
