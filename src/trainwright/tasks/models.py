"""A pretrained model, and what prepares its inputs, from a directory or the hub.

Owns: calling `from_pretrained` with the arguments of a task, and the error when nothing is found; new models, adapters.
Leaves to others: which auto class a task takes.
"""

from __future__ import annotations

import os
from typing import Any

from trainwright.interop.optional import require
from trainwright.names import closest
from trainwright.tasks.arguments import ModelArguments, TrainedModelArguments
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
    if isinstance(model, TrainedModelArguments) and model.config is not None:
        return _new_config({**model.config, **changes})
    name = model.config_name or model.model_name_or_path
    return _found(lambda: _auto("AutoConfig").from_pretrained(name, **_source(model), **changes), name, "config.json")


def _new_config(values: dict[str, Any]) -> Any:
    """A configuration of `values`, which have "model_type". DataError where that, or another, is unknown."""
    kinds = require("transformers", "A model of a configuration", extra="transformers").CONFIG_MAPPING
    kind = values["model_type"]
    if kind not in kinds:
        raise DataError(
            f"config.model_type={kind!r} is no architecture of the installed transformers.{closest(kind, kinds)}"
        )
    try:
        usual = kinds[kind]()
    except (TypeError, ValueError):  # such as two encoders side by side, which have no usual values
        usual = None
    for name in values:
        if usual is not None and not hasattr(usual, name):
            known = [*usual.to_dict(), *usual.attribute_map]
            raise DataError(f"config.{name}={values[name]!r}: a {kind} has no such value.{closest(name, known)}")
    try:
        return kinds[kind](**{name: value for name, value in values.items() if name != "model_type"})
    except (TypeError, ValueError) as error:
        raise DataError(f"config={values!r} makes no {kind}: {error}") from error


def fit_vocabulary(model: TrainedModelArguments, config: Any, tokenizer: Any) -> None:
    """Give a new configuration the size and the special tokens of `tokenizer`, where `model.config` names none."""
    values = {"vocab_size": len(tokenizer)}
    values |= {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    _complete(model, config, "text_config", values)


def fit_image_size(model: TrainedModelArguments, config: Any, size: tuple[int, int]) -> None:
    """Give a new configuration the `size` (height, width) of its images, where it has one and `model.config` none."""
    vision = getattr(config, "vision_config", None) or config
    if hasattr(vision, "image_size"):
        _complete(model, config, "vision_config", {"image_size": size[0] if size[0] == size[1] else list(size)})


def _complete(model: TrainedModelArguments, config: Any, part: str, values: dict[str, Any]) -> None:
    """Set those of `values` that `model.config` leaves out, in the `part` of a new configuration, where it has that."""
    if model.config is None:
        return
    inner = getattr(config, part, None)
    chosen = model.config if inner is None else model.config.get(part) or {}
    for name, value in values.items():
        if name not in chosen:
            setattr(config if inner is None else inner, name, value)


# Auto class -> how peft calls its task, by which it keeps a new head trainable.
_PEFT_TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def with_adapter(model: TrainedModelArguments, loaded: Any, auto_class: str) -> Any:
    """`loaded`, or a peft model around it whose adapter alone is trained, where `model.lora` asks for one.

    A head is trained and saved whole, since it may be new. DataError where `loaded` has no such layers, or an unknown
    head.
    """
    if model.lora is None:
        return loaded
    peft = require("peft", "Training an adapter (lora)", extra="peft")
    options = {"task_type": _PEFT_TASKS.get(auto_class), **model.lora}
    if options["task_type"] not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and "modules_to_save" not in options:
        options["modules_to_save"] = _heads(loaded, auto_class) or None
    try:
        return peft.get_peft_model(loaded, peft.LoraConfig(**options))
    except (TypeError, ValueError) as error:
        raise DataError(f"lora={model.lora!r} does not fit this model: {error}") from error


def load_with_adapter(model: TrainedModelArguments, auto_class: str, config: Any) -> Any:
    """`with_adapter` of `load_model`."""
    return with_adapter(model, load_model(model, auto_class, config), auto_class)


def _heads(loaded: Any, auto_class: str) -> list[str]:
    """The names of the layers of `loaded` that follow its encoder; none of a bare model ("AutoModel").

    peft knows only some by name (not DistilBERT's `pre_classifier`). An output layer that is tied to the embeddings,
    as that of a language model, is no head: it is not new.
    """
    encoder = loaded.base_model  # the model itself where that does not know it
    if auto_class == "AutoModel" or (encoder is loaded and auto_class in _PEFT_TASKS):
        return []
    if encoder is loaded:
        raise DataError(
            f"lora: which layers of a {type(loaded).__name__} are its head, to be trained whole, is not known. "
            "Name them in lora.modules_to_save; [] where none is new."
        )
    inside = set(map(id, encoder.parameters()))
    weights_of = {name: set(map(id, child.parameters())) for name, child in loaded.named_children()}
    return [name for name, weights in weights_of.items() if weights and not weights & inside]


def load_fast_tokenizer(model: ModelArguments, purpose: str, **options: Any) -> Any:
    """A tokenizer that knows which part of a text each token comes from. DataError, with `purpose`, for another."""
    tokenizer = load_processor(model, **options)
    if not tokenizer.is_fast:
        raise DataError(f"This task needs a fast tokenizer (tokenizer.json), which says {purpose}.")
    return tokenizer


def load_processor(model: ModelArguments, auto_class: str = "AutoTokenizer", **options: Any) -> Any:
    """Tokenizer, image processor, feature extractor or processor. `auto_class`: name of the class in `transformers`."""
    name = model.tokenizer_name or model.model_name_or_path
    needed = {"AutoTokenizer": "tokenizer.json", "AutoImageProcessor": "preprocessor_config.json"}
    return _found(
        lambda: _auto(auto_class).from_pretrained(name, **_source(model), **options),
        name,
        needed.get(auto_class, "preprocessor_config.json"),
    )


class Processors:
    """What prepares images or sounds, and texts, as one `processing_class`: a checkpoint holds both."""

    def __init__(self, processor: Any, tokenizer: Any) -> None:
        self.processor, self.tokenizer = processor, tokenizer

    def save_pretrained(self, directory: str) -> None:
        self.processor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def load_model(model: ModelArguments, auto_class: str, config: Any, **options: Any) -> Any:
    """The model with its saved weights, or with random ones where `from_scratch` asks for them.

    `auto_class`: the name of an auto class, or of a model class, in `transformers`. DataError where it has no such
    model.
    """
    try:
        return _load_model(model, auto_class, config, **options)
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        raise DataError(
            f"A {config.model_type} is no model for this task: transformers has no {auto_class} of it."
        ) from error


def _load_model(model: ModelArguments, auto_class: str, config: Any, **options: Any) -> Any:
    if model.from_scratch or (isinstance(model, TrainedModelArguments) and model.config is not None):
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
