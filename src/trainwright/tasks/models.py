"""A pretrained model, and what prepares its inputs, from a directory or the hub.

Owns: calling `from_pretrained` with the arguments of a task, and the error when nothing is found. Leaves to others:
which auto class a task takes.
"""

from __future__ import annotations

import os
from typing import Any

from trainwright.interop.optional import require
from trainwright.names import closest
from trainwright.tasks.arguments import ModelArguments
from trainwright.tasks.errors import DataError


def _source(model: ModelArguments) -> dict[str, Any]:
    return {
        "cache_dir": model.cache_dir,
        "revision": model.model_revision,
        "trust_remote_code": model.trust_remote_code,
    }


def _auto(name: str) -> Any:
    return getattr(require("transformers", "Loading a pretrained model", extra="transformers"), name)


def load_config(model: ModelArguments, **changes: Any) -> Any:
    """The model's configuration with `changes`."""
    name = model.config_name or model.model_name_or_path
    return _found(lambda: _auto("AutoConfig").from_pretrained(name, **_source(model), **changes), name, "config.json")


def load_processor(model: ModelArguments, auto_class: str = "AutoTokenizer", **options: Any) -> Any:
    """Tokenizer, image processor, feature extractor or processor. `auto_class`: name of the class in `transformers`."""
    name = model.tokenizer_name or model.model_name_or_path
    needed = {"AutoTokenizer": "tokenizer.json", "AutoImageProcessor": "preprocessor_config.json"}
    return _found(
        lambda: _auto(auto_class).from_pretrained(name, **_source(model), **options),
        name,
        needed.get(auto_class, "preprocessor_config.json"),
    )


def load_model(model: ModelArguments, auto_class: str, config: Any, **options: Any) -> Any:
    """The model with its saved weights, or with random ones where `from_scratch` asks for them.

    `auto_class`: the name of an auto class, or of a model class, in `transformers`.
    """
    if model.from_scratch:
        cls = _auto(auto_class)
        build = getattr(cls, "from_config", None)  # auto classes have it; a model class takes its configuration
        return cls(config) if build is None else build(config, trust_remote_code=model.trust_remote_code)
    name = model.model_name_or_path
    return _found(
        lambda: _auto(auto_class).from_pretrained(
            name, config=config, ignore_mismatched_sizes=model.ignore_mismatched_sizes, **_source(model), **options
        ),
        name,
        "model.safetensors",
    )


def _found(load: Any, name: str, needed: str) -> Any:
    try:
        return load()
    except OSError as error:
        if os.path.isdir(name):
            raise DataError(
                f"{name} holds no {needed} that can be read; it holds {sorted(os.listdir(name))}."
            ) from error
        folder = os.path.dirname(name) or "."
        near = closest(os.path.basename(name), os.listdir(folder)) if os.path.isdir(folder) else ""
        raise DataError(
            f"{name!r} is no directory here, and was not found on the hub ({str(error).splitlines()[0]}).{near}"
        ) from error
