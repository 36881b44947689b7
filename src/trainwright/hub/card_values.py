"""Plain values for a model card, from arguments, data sets and the environment.

Owns: which hyper-parameters, versions and data set names a card lists. Leaves to others: writing the card.
"""

from __future__ import annotations

from typing import Any

from trainwright.interop.loaded import is_hf_dataset, is_hf_iterable_dataset
from trainwright.interop.optional import version_text

# Builders that only name a file format say nothing about the data.
_FILE_FORMATS = {"csv", "json", "pandas", "parquet", "text", "arrow", "generator", "imagefolder", "audiofolder"}


def hyperparameters_of(args: Any, num_processes: int = 1) -> dict[str, Any]:
    """The arguments that a card lists, in reading order; `num_processes` multiplies the batch."""
    accumulation = getattr(args, "gradient_accumulation_steps", 1)
    listed: dict[str, Any] = {
        "learning_rate": args.learning_rate,
        "train_batch_size": args.train_batch_size,
        "eval_batch_size": args.eval_batch_size,
        "seed": args.seed,
    }
    if num_processes > 1:
        listed["num_processes"] = num_processes
    if accumulation > 1:
        listed["gradient_accumulation_steps"] = accumulation
    if num_processes * accumulation > 1:
        listed["total_train_batch_size"] = args.train_batch_size * num_processes * accumulation
    listed["optimizer"] = _optimizer_of(args)
    listed["lr_scheduler_type"] = _value(args.lr_scheduler_type)
    for name in ("warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "label_smoothing_factor"):
        if getattr(args, name, None):
            listed[name] = getattr(args, name)
    if getattr(args, "max_steps", -1) > 0:
        listed["training_steps"] = args.max_steps
    else:
        listed["num_epochs"] = args.num_train_epochs
    precision = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), None)
    if precision:
        listed["mixed_precision"] = precision
    return listed


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions of the packages a run used; absent ones are left out."""
    names = distributions or ("trainwright", "torch", "transformers", "peft", "datasets", "tokenizers")
    return {name: text for name in names if (text := version_text(name)) is not None}


def dataset_names(dataset: Any) -> tuple[str | None, str | None]:
    """(tag on the Hub, configuration) of a `datasets` data set; (None, None) where it has none."""
    if not (is_hf_dataset(dataset) or is_hf_iterable_dataset(dataset)):
        return None, None
    tag = dataset.builder_name
    return (None, None) if tag is None or tag in _FILE_FORMATS else (tag, dataset.config_name)


def _value(option: Any) -> Any:
    return getattr(option, "value", option)


def _optimizer_of(args: Any) -> str:
    text = str(_value(args.optim))
    if "adam" in text:
        text += f" (betas {args.adam_beta1} and {args.adam_beta2}, epsilon {args.adam_epsilon})"
    extra = getattr(args, "optim_args", None)
    return f"{text}, {extra}" if extra else text
