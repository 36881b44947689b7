"""Loaders, samplers and collators as a run's arguments ask for them.

Owns: reading `args`. Leaves to others: building (loaders, samplers, collate), which know no arguments.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from trainwright.data.collate_base import default_data_collator
from trainwright.data.collate_padding import DataCollatorWithPadding
from trainwright.data.distributed_samplers import get_dataloader_sampler
from trainwright.data.length_grouping import LengthGroupedSampler, LengthSortedSampler
from trainwright.data.loaders import build_dataloader
from trainwright.data.samplers import build_eval_sampler, build_train_sampler, has_length
from trainwright.data.workers import seed_worker, shield
from trainwright.interop.loaded import is_hf_dataset, is_hf_iterable_dataset

if TYPE_CHECKING:
    from trainwright.args.accelerator_config import AcceleratorConfig
    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

TORCH_PREFETCH_FACTOR = 2


def is_iterable(dataset: Any) -> bool:
    """Whether samples come one after the other, without indices."""
    return isinstance(dataset, IterableDataset) or is_hf_iterable_dataset(dataset)


def has_columns(dataset: Any) -> bool:
    """Whether columns can be removed from the data set itself, before a sample is read."""
    return is_hf_dataset(dataset) or is_hf_iterable_dataset(dataset)


def check_train_dataset(dataset: Any, args: TrainingArguments) -> None:
    """Find before training that a data set cannot be trained on. Raises ValueError naming the cure."""
    if has_length(dataset):
        if len(dataset) == 0:
            raise ValueError("train_dataset is empty: it has no sample to train on.")
        return
    if args.max_steps <= 0:
        raise ValueError(
            f"train_dataset ({type(dataset).__name__}) has no length, so "
            f"num_train_epochs={args.num_train_epochs} cannot be "
            "turned into steps. Pass TrainingArguments(max_steps=...), or give the data set a __len__."
        )
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} needs the lengths of all samples in "
            "advance, and "
            f"train_dataset ({type(dataset).__name__}) has no length. Use a map-style data set, or leave it unset."
        )


def default_collator_for(
    processing_class: Any, model: nn.Module | None = None, *, packs: bool = False
) -> Callable[[list[Any]], Any]:
    """Padding, where `processing_class` is a tokenizer or feature extractor that pads; stacking otherwise. Where
    training samples are packed, those of an evaluation get labels as packs do, and padding for tokens and labels.
    """
    if packs:
        from trainwright.data.collate_packing import DataCollatorForUnpacked
        from trainwright.interop.loaded import is_pretrained_model
        from trainwright.interop.models import base_model_of
        from trainwright.interop.packed_attention import first_position, packed_inputs

        config = getattr(model, "config", None)
        known = (getattr(owner, "pad_token_id", None) for owner in (processing_class, config))
        pad = next((token for token in known if isinstance(token, int) and token >= 0), 0)
        names: tuple[str, ...] = ()
        if model is not None and not is_pretrained_model(base_model_of(model)):
            with contextlib.suppress(ValueError):  # a model that cannot be packed: `train` says why
                names = packed_inputs(model, 0).names
        first = first_position(model) if names and model is not None else 0
        return DataCollatorForUnpacked(default_collator_for(processing_class), pad, names, first)
    if hasattr(processing_class, "pad") and (
        hasattr(processing_class, "pad_token_id") or hasattr(processing_class, "padding_value")
    ):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def check_indexable(dataset: Any) -> None:
    """Raise TypeError for what is no data set though it looks like one: several by name, a loader, a generator."""
    if isinstance(dataset, Mapping) and 0 not in dataset:
        names = list(dataset)
        raise TypeError(
            f"The data set is a {type(dataset).__name__} with the keys {names}, not samples. Pass one of its values, "
            f"such as dataset[{names[0]!r}]."
            if names
            else "The data set is an empty dict."
        )
    if isinstance(dataset, DataLoader):
        raise TypeError(
            "The data set is a DataLoader. Pass the data set inside it and set per_device_train_batch_size, "
            "or override "
            "get_train_dataloader (get_eval_dataloader) to use a loader of your own."
        )
    if not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"The data set is a {type(dataset).__name__}, whose samples cannot be had by index. Pass a list, an object "
            "with __getitem__ and __len__, or a torch.utils.data.IterableDataset."
        )


def accelerator_config_of(args: TrainingArguments) -> AcceleratorConfig:
    """`args.accelerator_config`, which is one once the arguments are made, whatever was given."""
    return cast("AcceleratorConfig", args.accelerator_config)


def why_no_batch(dataset: Any, args: TrainingArguments, batch_size: int, tp_size: int = 1) -> str | None:
    """Why an evaluation of `dataset` gives no batch though there are samples, and what to do; None: it gives some.
    `tp_size`: processes that read one batch together.
    """
    if not args.dataloader_drop_last or is_iterable(dataset) or not has_length(dataset):
        return None
    shares = 1 if accelerator_config_of(args).split_batches else args.world_size // tp_size
    if not 0 < len(dataset) < batch_size * shares:
        return None
    return (
        f"{len(dataset)} samples do not fill the batches of {batch_size} (per_device_eval_batch_size) that "
        f"{shares} process(es) take, and dataloader_drop_last=True leaves out what does not fill them, so an "
        f"evaluation sees nothing. Set per_device_eval_batch_size to at most {max(1, len(dataset) // shares)}, or "
        "dataloader_drop_last=False."
    )


def reads_evenly(args: TrainingArguments, dataset: Any) -> bool:
    """Whether the micro-batches that processes read at a time have as many samples, as far as that is known."""
    return (
        has_length(dataset)
        and bool(getattr(args.accelerator_config, "even_batches", True))
        and args.train_sampling_strategy != "batch_rebalance"
    )


def data_seed(args: TrainingArguments) -> int:
    """Seed of the order of the data: `data_seed` where the user set one, so that it can be held while `seed` varies."""
    return int(args.seed if args.data_seed is None else args.data_seed)


def train_sampler_for(
    dataset: Any, args: TrainingArguments, *, batch_size: int, model_input_name: str, strategy: str | None = None
) -> Sampler[Any] | None:
    """The order of the training samples; None where the data set brings its own. `batch_size`: samples per
    micro-batch.
    """
    if dataset is None or is_iterable(dataset):
        return None
    check_indexable(dataset)
    strategy = strategy or args.train_sampling_strategy
    balances = strategy == "batch_rebalance"  # it plans the updates of all processes together
    return build_train_sampler(
        dataset,
        strategy=strategy,
        seed=data_seed(args),
        batch_size_for_grouping=batch_size * args.gradient_accumulation_steps * (args.world_size if balances else 1),
        length_column_name=args.length_column_name,
        model_input_name=model_input_name,
        world_size=args.world_size,
        rank=args.process_index,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        drop_last=args.dataloader_drop_last,
        num_workers=args.dataloader_num_workers,
    )


def eval_sampler_for(dataset: Any, args: TrainingArguments, *, model_input_name: str) -> Sampler[Any] | None:
    """The order of the evaluation samples: as they lie, or by length where the arguments ask for that."""
    if dataset is None or is_iterable(dataset):
        return None
    check_indexable(dataset)
    return build_eval_sampler(
        dataset,
        strategy=args.eval_sampling_strategy or args.train_sampling_strategy,
        batch_size=args.eval_batch_size,
        length_column_name=args.length_column_name,
        model_input_name=model_input_name,
        seed=data_seed(args),
        num_workers=args.dataloader_num_workers,
    )


def sampled_order(dataloader: Any) -> Any:
    """The sample that each row of one pass over a loader is, where its sampler changed the order; else None."""
    sampler = get_dataloader_sampler(dataloader)
    return sampler.order if isinstance(sampler, (LengthGroupedSampler, LengthSortedSampler)) else None


def loader_for(
    dataset: Any,
    args: TrainingArguments,
    *,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any],
    sampler: Any,
    is_training: bool,
    process_index: int,
    tp_size: int = 1,
) -> DataLoader[Any]:
    """A `DataLoader` with the run's workers. An evaluation draws nothing from the global generator, so that evaluating
    in between does not change what training sees. Workers outlive signals where the run answers those itself."""
    if not is_iterable(dataset):
        check_indexable(dataset)
    if not is_training and args.eval_sampling_strategy not in (None, "sequential"):
        if is_iterable(dataset) or not has_length(dataset):
            raise ValueError(
                f"eval_sampling_strategy={args.eval_sampling_strategy!r} needs the lengths of all samples in advance, "
                f"and the evaluation data ({type(dataset).__name__}) has no length. Use a map-style data set, or leave "
                "it unset."
            )
    nothing = None if is_training else why_no_batch(dataset, args, batch_size, tp_size)
    if nothing is not None:
        logger.warning("%s", nothing)
    loader = build_dataloader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate_fn,
        sampler=sampler,
        drop_last=args.dataloader_drop_last,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=_prefetch_factor(args, is_training),
        worker_init_fn=functools.partial(seed_worker, num_workers=args.dataloader_num_workers, rank=process_index)
        if is_training
        else None,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order or not is_training,  # a prediction must belong to its sample
        timeout_s=args.dataloader_timeout if is_training else 0,
        generator=None if is_training else torch.Generator().manual_seed(args.seed),
        seed=data_seed(args) if is_training else None,
    )
    return shield(loader) if args.save_on_signal or args.enable_jit_checkpoint else loader


def evaluation_settings(args: TrainingArguments) -> tuple[Any, ...]:
    """What a loader of an evaluation is built from, besides its data set and collator."""
    return (
        args.eval_batch_size, args.dataloader_num_workers, args.dataloader_prefetch_factor, args.dataloader_drop_last,
        args.dataloader_pin_memory, args.dataloader_multiprocessing_context, args.remove_unused_columns,
        args.eval_sampling_strategy, args.train_sampling_strategy, args.length_column_name,
    )  # fmt: skip


def _prefetch_factor(args: TrainingArguments, is_training: bool) -> int | None:
    """Batches each worker makes ahead: together at least those of one update, because the loop takes all of these at
    once, and workers that stop after two each would leave it waiting for the others."""
    wanted: int | None = args.dataloader_prefetch_factor
    if wanted is None and is_training and args.dataloader_num_workers > 0:
        share = -(-args.gradient_accumulation_steps // args.dataloader_num_workers)
        wanted = share if share > TORCH_PREFETCH_FACTOR else None
    return wanted


def num_samples(dataloader: Any) -> int | None:
    """Samples that one pass over a loader gives; None where that is not known before reading them."""
    dataset = getattr(dataloader, "dataset", None)
    if type(dataset).__name__ == "IterableDatasetShard":  # whose length is one process's share
        dataset = getattr(dataset, "dataset", None)
    if dataset is not None and has_length(dataset) and not getattr(dataloader, "drop_last", False):
        return len(dataset)
    return None
