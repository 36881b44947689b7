"""What a model can be given: tokens, positions, labels.

Owns: `ModelLimits`, read from the layers and the config of a `transformers` model; a plain module has none that could
be known. Leaves to others: comparing data with them (`batch`, `dataset`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trainwright.interop.loaded import is_pretrained_model
from trainwright.interop.models import base_model_of, configs_of

_ONE_LABEL = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification", "ForVideoClassification")
_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe")
_OTHER_TOWERS = ("vision", "visual", "image", "audio", "pixel", "relative")  # whose positions are no tokens


@dataclass(frozen=True)
class ModelLimits:
    """What is known of one model; None where it is not."""

    class_name: str = ""
    is_known: bool = False  # it is a model of transformers, so that the rest means something
    vocabulary: int | None = None  # rows of the token embedding
    placeholders: frozenset[int] = frozenset()  # tokens that the model replaces (an image's), which may have no row
    target_vocabulary: int | None = None  # classes of a language model's output layer
    positions: int | None = None  # tokens that a table of positions has room for
    trained_positions: int | None = None  # tokens that computed positions (rotary) were trained with
    num_labels: int | None = None  # classes, of a model that gives each sample or token one
    labels_tokens: bool = False  # ... each token
    computes_usual_loss: bool = False  # its forward is that of transformers, not of a subclass elsewhere
    problem: str | None = None  # "regression", "multi_label_classification", ... where the config says so
    predicts_tokens: str | None = None  # "causal", "masked", "seq2seq": what kind of language model it is
    main_input: str | None = None  # "input_ids", "pixel_values" ...

    @classmethod
    def of(cls, model: nn.Module) -> ModelLimits:
        base: Any = base_model_of(model)
        name = type(base).__name__
        if not is_pretrained_model(base):
            return cls(class_name=name)
        config = base.config
        of_text: Any = configs_of(base)[-1]
        is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        kind = _kind_of_language_model(name, is_encoder_decoder)
        table = _positions(base, is_encoder_decoder)
        labels_tokens = name.endswith("ForTokenClassification")
        tokens = [value for key, value in vars(config).items() if key.endswith(("token_id", "token_index"))]
        return cls(
            class_name=name,
            is_known=True,
            vocabulary=_rows_of(base, "get_input_embeddings"),
            placeholders=frozenset(value for value in tokens if isinstance(value, int)),
            target_vocabulary=_rows_of(base, "get_output_embeddings") if kind else None,
            positions=table,
            trained_positions=getattr(of_text, "max_position_embeddings", None) if table is None else None,
            num_labels=config.num_labels if name.endswith(_ONE_LABEL) or labels_tokens else None,
            labels_tokens=labels_tokens,
            computes_usual_loss=type(base).forward.__module__.startswith("transformers."),
            problem=getattr(config, "problem_type", None),
            predicts_tokens=kind,
            main_input=getattr(base, "main_input_name", None),
        )


def _kind_of_language_model(name: str, is_encoder_decoder: bool) -> str | None:
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if name.endswith("ForMaskedLM"):
        return "masked"
    if is_encoder_decoder and name.endswith(("ForConditionalGeneration", "ForSeq2SeqLM")):
        return "seq2seq"
    return None


def _rows_of(model: Any, getter: str) -> int | None:
    try:
        layer = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # a model of images
        return None
    layer = getattr(layer, "base_layer", layer)  # of an adapter, whose own weights have other shapes
    rows = getattr(layer, "num_embeddings", None)  # of an output layer: its classes
    return rows if rows is not None else getattr(layer, "out_features", None)


def _positions(model: nn.Module, is_encoder_decoder: bool) -> int | None:
    """How many tokens the smallest table of positions has room for, of the part of the model that reads the input."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or path.rpartition(".")[2] not in _TABLES:
            continue
        if any(word in path for word in _OTHER_TOWERS) or (is_encoder_decoder and "decoder." in path):
            continue
        # Tables that begin behind the padding token's number (RoBERTa), or keep rows free (OPT, BART).
        padding = module.padding_idx
        offset = getattr(module, "offset", None) or (padding + 1 if padding is not None else 0)
        found.append(module.num_embeddings - offset)
    return min(found, default=None)
