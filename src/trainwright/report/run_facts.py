"""What a run is, for the page about it: name, model, device, versions, settings.

Owns: which facts are recorded, as plain data. Leaves to others: writing them (`metrics_file`, with the first line of a
run), showing them (`html`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import time
from typing import TYPE_CHECKING, Any

from trainwright.interop.optional import version_text
from trainwright.log_values import plain_value
from trainwright.optim.groups import get_model_param_count

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft")
# Are shown elsewhere, follow from another one, or are secrets.
NOT_SETTINGS = ("output_dir", "logging_dir", "run_name", "seed", "do_eval")
LONGEST_VALUE = 200  # characters of a setting


def facts_of_run(args: TrainingArguments, model: nn.Module, output_dir: str, max_steps: int) -> dict[str, Any]:
    """Name, start (seconds since 1970), model, device, versions, seed, the settings that differ from their defaults.

    Without secrets, host and user. No device is waited for. `model` is not wrapped; a divided one counts whole. Empty
    where something of it cannot be read: that is not worth a run.
    """
    try:
        return _facts(args, model, output_dir, max_steps)
    except Exception as error:
        logger.debug("What this run is could not be recorded: %s: %s", type(error).__name__, error)
        return {}


def _facts(args: TrainingArguments, model: nn.Module, output_dir: str, max_steps: int) -> dict[str, Any]:
    metric = args.metric_for_best_model
    return {
        "name": args.run_name if args.run_name not in (None, args.output_dir) else os.path.basename(output_dir),
        "started": round(time.time(), 3),
        "max_steps": max_steps,
        "model": _model_name(model),
        "num_parameters": get_model_param_count(model),
        "num_trainable_parameters": get_model_param_count(model, trainable_only=True),
        "device": _device_name(args),
        "num_processes": args.world_size,
        "seed": args.seed,
        "metric": metric,
        "greater_is_better": args.greater_is_better if metric else None,
        "versions": _versions(),
        "settings": differing_settings(args),
    }


def differing_settings(args: TrainingArguments) -> dict[str, Any]:
    """Name -> value, without secrets, of the arguments that have another value than their default."""
    values = args.to_dict()
    differing = {}
    for field in dataclasses.fields(args):
        if field.name not in values or field.name in NOT_SETTINGS or field.name.endswith("_token"):
            continue
        if field.default is None and _is_filled_in(args, field.name):
            continue
        value, default = values[field.name], field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default = getattr(default, "value", default)  # of an enum
        if value != default and not (default in (None, "") and value in ({}, [])):  # nothing, in another form
            differing[field.name] = _shown(value)
    return differing


def _is_filled_in(args: TrainingArguments, name: str) -> bool:
    """Whether an argument that was not given has what the others make of that: off, or a configuration of defaults."""
    value = getattr(args, name)
    if value is False or (name == "fsdp_config" and not args.fsdp):
        return True
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return False
    try:
        return bool(value == type(value)())
    except (TypeError, ValueError):  # one that cannot be made of defaults
        return False


def _shown(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else str(plain_value(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _model_name(model: nn.Module) -> str:
    name = type(model).__name__
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{name} ({os.path.basename(path.rstrip('/'))})" if isinstance(path, str) and path.strip("/") else name


def _device_name(args: TrainingArguments) -> str:
    import torch

    if args.device.type == "cuda":
        return torch.cuda.get_device_name(args.device)
    return "CPU" if args.device.type == "cpu" else args.device.type


def _versions() -> dict[str, str]:
    from trainwright import __version__

    installed = {package: text for package in PACKAGES if (text := version_text(package)) is not None}
    return {"trainwright": __version__, "python": platform.python_version(), **installed}
