"""Recognise an object of another library without importing that library.

Owns: "is this a `transformers` model, a `datasets` dataset, a peft model?", answered through `sys.modules`: where the
library was never imported, no object of it can exist. Leaves to others: what to do with the answer.
"""

from __future__ import annotations

import sys


def is_instance_of(value: object, module: str, *class_names: str) -> bool:
    """Whether `value` is an instance of `module.<class_name>` for one of the names; False when the module is not
    loaded.
    """
    loaded = sys.modules.get(module)
    if loaded is None:
        return False
    classes = tuple(c for c in (getattr(loaded, name, None) for name in class_names) if isinstance(c, type))
    return bool(classes) and isinstance(value, classes)


def is_pretrained_model(model: object) -> bool:
    """A `transformers` model: it saves itself with `save_pretrained` and carries a config."""
    return is_instance_of(model, "transformers.modeling_utils", "PreTrainedModel")


def is_pretrained_config(config: object) -> bool:
    """The configuration of a `transformers` model."""
    return is_instance_of(config, "transformers.configuration_utils", "PretrainedConfig")


def is_peft_model(model: object) -> bool:
    """A model wrapped by peft: only its adapter is trained and saved."""
    return is_instance_of(model, "peft", "PeftModel", "PeftMixedModel")


def is_deepspeed_engine(model: object) -> bool:
    """A model wrapped by `deepspeed.initialize`."""
    return is_instance_of(model, "deepspeed.runtime.engine", "DeepSpeedEngine")


def has_adapters(model: object) -> bool:
    """A model of which only adapters are saved: wrapped by peft, or a `transformers` model that carries its own."""
    return is_peft_model(model) or bool(getattr(model, "_hf_peft_config_loaded", False))


def is_hf_dataset(dataset: object) -> bool:
    """A map-style `datasets.Dataset`: it knows its columns and can drop some."""
    return is_instance_of(dataset, "datasets", "Dataset")


def is_hf_iterable_dataset(dataset: object) -> bool:
    """A streaming `datasets.IterableDataset`."""
    return is_instance_of(dataset, "datasets", "IterableDataset")
