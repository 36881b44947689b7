"""Older and newer names of arguments: one row each.

Owns: which name became which, which generation no longer has it, and how a value is carried over. Leaves to others:
applying the rows to a call (`constructor.py`). Reading order of a row: old name, what to write today, the generation
without it, translation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright.args.checks import typed

Given = Mapping[str, Any]
Translate = Callable[[Any, Given], dict[str, Any]]


@dataclass(frozen=True)
class Renamed:
    """One older name."""

    old: str
    instead: str  # what to write today, as code
    gone_by: str  # "4.55" or "5.23", the first of the two documented generations that has no such name
    translate: Translate  # (value, everything that was passed) -> newer arguments
    merges: bool = False  # adds to a newer argument, so that passing both is no contradiction


def _to(new: str) -> Translate:
    return lambda value, given: {new: value}


def _fixed(**newer: Any) -> Translate:
    return lambda value, given: dict(newer) if value else {}


def _into_accelerator_config(key: str) -> Translate:
    def translate(value: Any, given: Given) -> dict[str, Any]:
        from trainwright.args.accelerator_config import AcceleratorConfig

        config = AcceleratorConfig.parse(given.get("accelerator_config")).to_dict()
        return {"accelerator_config": {**config, key: typed(value)}}

    return translate


def _add_metric_inputs(value: Any, given: Given) -> dict[str, Any]:
    present = list(given.get("include_for_metrics") or [])
    return {"include_for_metrics": present if not value or "inputs" in present else [*present, "inputs"]}


def _hub_model_id(value: Any, given: Given) -> dict[str, Any]:
    organization = given.get("push_to_hub_organization")
    name = given.get("push_to_hub_model_id") or Path(given.get("output_dir") or "trainer_output").name
    return {"hub_model_id": f"{organization}/{name}" if organization else name}


def _sharded_ddp(value: Any, given: Given) -> dict[str, Any]:
    """FairScale's words as FSDP's."""
    words = value.split() if isinstance(value, str) else [getattr(word, "value", word) for word in value or []]
    fsdp = {"simple": "shard_grad_op", "zero_dp_2": "shard_grad_op", "zero_dp_3": "full_shard"}
    return {"fsdp": " ".join(fsdp.get(word, word) for word in words)} if words else {}


def _half_precision_backend(value: Any, given: Given) -> dict[str, Any]:
    return {"half_precision_backend": "auto" if value in ("amp", "cuda_amp") else value}


def _no_change(value: Any, given: Given) -> dict[str, Any]:
    return {}  # the field still exists and is read where it takes effect


RENAMED: dict[str, Renamed] = {
    row.old: row
    for row in (
        # Names that are no fields any more: accepted, translated, gone.
        Renamed("evaluation_strategy", "eval_strategy=...", "4.55", _to("eval_strategy")),
        Renamed("xpu_backend", "ddp_backend=...", "4.55", _to("ddp_backend")),
        Renamed("sharded_ddp", "fsdp=...", "4.55", _sharded_ddp),
        Renamed(
            "dispatch_batches",
            "accelerator_config={'dispatch_batches': ...}",
            "4.55",
            _into_accelerator_config("dispatch_batches"),
            merges=True,
        ),
        Renamed(
            "split_batches",
            "accelerator_config={'split_batches': ...}",
            "4.55",
            _into_accelerator_config("split_batches"),
            merges=True,
        ),
        # Names that remain fields of 4.55: they keep their value and take effect.
        Renamed(
            "per_gpu_train_batch_size", "per_device_train_batch_size=...", "5.23", _to("per_device_train_batch_size")
        ),
        Renamed("per_gpu_eval_batch_size", "per_device_eval_batch_size=...", "5.23", _to("per_device_eval_batch_size")),
        Renamed("no_cuda", "use_cpu=True", "5.23", _to("use_cpu")),
        Renamed("adafactor", "optim='adafactor'", "5.23", _fixed(optim="adafactor")),
        Renamed("fp16_backend", "half_precision_backend=...", "5.23", _half_precision_backend),
        Renamed("torchdynamo", "torch_compile_backend=...", "5.23", _to("torch_compile_backend")),
        Renamed("push_to_hub_token", "hub_token=...", "5.23", _to("hub_token")),
        Renamed("push_to_hub_model_id", "hub_model_id='name'", "5.23", _hub_model_id),
        Renamed("push_to_hub_organization", "hub_model_id='organization/name'", "5.23", _hub_model_id),
        Renamed(
            "include_inputs_for_metrics", "include_for_metrics=['inputs']", "5.23", _add_metric_inputs, merges=True
        ),
        Renamed("tpu_metrics_debug", "debug='tpu_metrics_debug'", "5.23", _no_change),
        Renamed("use_mps_device", "nothing: the device is found by itself", "5.23", _no_change),
        Renamed("fsdp_min_num_params", "fsdp_config={'min_num_params': ...}", "5.23", _no_change),
        Renamed(
            "fsdp_transformer_layer_cls_to_wrap",
            "fsdp_config={'transformer_layer_cls_to_wrap': [...]}",
            "5.23",
            _no_change,
        ),
        Renamed("use_ipex", "nothing: PyTorch has these optimizations itself", "5.23", _no_change),
    )
}

# Values that were renamed: (argument, older value) -> newer value, the generation without it.
RENAMED_VALUES: dict[tuple[str, str], tuple[str, str]] = {
    ("optim", "adamw_hf"): ("adamw_torch", "4.55"),
    ("half_precision_backend", "amp"): ("auto", "4.55"),
    ("half_precision_backend", "cuda_amp"): ("auto", "4.55"),
}

# Two names of one setting, from the older and the newer generation. Both are right; the one that is passed sets the
# other.
TWINS: tuple[tuple[str, str], ...] = (
    ("group_by_length", "train_sampling_strategy"),
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)


def twin_value(name: str, value: Any, current: Any) -> Any:
    """What the twin of `name` must hold once `name` holds `value`; `current` is what the twin holds now."""
    if name == "group_by_length":
        if isinstance(value, str):  # from a command line or a file
            value = typed(value)
        return "group_by_length" if value else ("random" if current == "group_by_length" else current)
    if name == "train_sampling_strategy":
        return value == "group_by_length"
    return value


# What other libraries and scripts call an argument: only for the hint of an error.
OF_OTHERS: dict[str, str] = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "max_epochs": "num_train_epochs",
    "n_epochs": "num_train_epochs",
    "steps": "max_steps",
    "num_train_steps": "max_steps",
    "num_training_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "clip_grad": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "num_workers": "dataloader_num_workers",
    "save_every": "save_steps",
    "eval_every": "eval_steps",
    "val_check_interval": "eval_steps",
    "log_every_n_steps": "logging_steps",
    "default_root_dir": "output_dir",
    "save_dir": "output_dir",
    "logger": "report_to",
}
