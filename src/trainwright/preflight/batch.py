"""What is wrong with a batch, in words.

Owns: comparing one batch with what the model can be given (`ModelLimits`). Leaves to others: whole columns (`dataset`),
when to look (`check`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from trainwright.names import IGNORE_INDEX
from trainwright.preflight.model_limits import ModelLimits

COLLATOR_OF = {
    "causal": "DataCollatorForLanguageModeling(tokenizer, mlm=False), which makes them of input_ids",
    "masked": "DataCollatorForLanguageModeling(tokenizer), which masks tokens and makes them of input_ids",
    "seq2seq": "DataCollatorForSeq2Seq(tokenizer, model=model); labels of a sample are the tokens of its target",
}


def problems(
    batch: Any,
    limits: ModelLimits,
    *,
    label_names: Sequence[str],
    loss_is_the_models: bool,
    is_packed: bool,
    label_like: Sequence[str] = (),
) -> Iterator[str]:
    """What the model cannot be given in `batch`, each with value, row and cure. Nothing for what is no mapping.

    loss_is_the_models: it is computed inside the model, so labels are as the model takes them. is_packed: several
    samples are one row. label_like: columns of the data set that may be labels under another name.
    """
    if not isinstance(batch, Mapping) or not limits.is_known:
        return
    yield from _missing_inputs(batch, limits)
    tokens = batch.get("input_ids")
    if isinstance(tokens, torch.Tensor) and not tokens.is_floating_point() and tokens.numel():
        yield from _bad_tokens(tokens, limits)
    yield from _too_long(batch, limits, is_packed)
    if loss_is_the_models and limits.computes_usual_loss:
        yield from _bad_labels(batch, limits, label_names, label_like)


def too_long_for_training(batch: Any, limits: ModelLimits, is_packed: bool) -> str | None:
    """A remark about sequences beyond those that a model with computed positions was trained with; None: none."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    longest = limits.trained_positions
    if longest is None or is_packed or not isinstance(tokens, torch.Tensor) or tokens.ndim != 2:
        return None
    if tokens.shape[1] <= longest or "position_ids" in batch:
        return None
    return (
        f"A batch has sequences of {tokens.shape[1]} tokens, and {limits.class_name} was made for "
        f"max_position_embeddings={longest}: it runs on longer ones, and has not learnt their positions. Truncate "
        f"them (max_length={longest}, truncation=True) unless that is meant."
    )


def _missing_inputs(batch: Mapping[str, Any], limits: ModelLimits) -> Iterator[str]:
    main = limits.main_input
    if main is None or main in batch or any(name.endswith("embeds") or name == "encoder_outputs" for name in batch):
        return
    yield (
        f"The batch has no {main!r}, the input of {limits.class_name}; it has {list(batch)}. A data_collator makes the "
        "model's inputs; text must be tokenised first: dataset.map(lambda row: tokenizer(row['text'], "
        "truncation=True), batched=True)."
    )


def _bad_tokens(tokens: torch.Tensor, limits: ModelLimits) -> Iterator[str]:
    if limits.vocabulary is None:
        return
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low >= 0 and high < limits.vocabulary:
        return
    for token in limits.placeholders:
        tokens = tokens.where(tokens != token, 0)
    low, high = (int(value) for value in torch.aminmax(tokens))
    if high >= limits.vocabulary:
        row, place = _first(tokens >= limits.vocabulary)
        yield (
            f"input_ids holds the token {int(tokens[tuple(place)])} in row {row} of the batch, and the embedding of "
            f"{limits.class_name} has {limits.vocabulary} rows (0..{limits.vocabulary - 1}). Use the tokenizer of this "
            "model, or, where tokens were added to it, model.resize_token_embeddings(len(tokenizer))."
        )
    elif low < 0:
        row, place = _first(tokens < 0)
        cause = " -100 belongs into labels, not into inputs." if low == IGNORE_INDEX else ""
        yield (
            f"input_ids holds {int(tokens[tuple(place)])} in row {row} of the batch; tokens are "
            f"0..{limits.vocabulary - 1}.{cause} Pad with the tokenizer's pad_token_id."
        )


def _too_long(batch: Mapping[str, Any], limits: ModelLimits, is_packed: bool) -> Iterator[str]:
    tokens, positions = batch.get("input_ids"), batch.get("position_ids")
    if limits.positions is None or not isinstance(tokens, torch.Tensor) or tokens.ndim != 2:
        return
    if isinstance(positions, torch.Tensor):
        longest = int(positions.max()) + 1 if positions.numel() else 0
    else:
        longest = 0 if is_packed else tokens.shape[1]
    if longest > limits.positions:
        yield (
            f"The batch has a sequence of {longest} tokens, and {limits.class_name} has positions for "
            f"{limits.positions}. Truncate: tokenizer(..., truncation=True, max_length={limits.positions})."
        )


def _bad_labels(
    batch: Mapping[str, Any], limits: ModelLimits, label_names: Sequence[str], label_like: Sequence[str]
) -> Iterator[str]:
    if limits.predicts_tokens is None and limits.num_labels is None:
        return
    labels = batch.get("labels")
    if labels is None:
        if any(name in batch for name in label_names) or "shift_labels" in batch:
            return
        yield no_labels(limits, list(batch), label_like)
    elif isinstance(labels, torch.Tensor) and labels.numel():
        if limits.predicts_tokens is not None:
            yield from _bad_target_tokens(labels, limits)
        elif problem := wrong_kind(labels, limits):
            yield problem
        elif not labels.is_floating_point() and limits.num_labels != 1 and limits.problem != "regression":
            if limits.labels_tokens:
                yield from _labels_of_another_length(batch, labels)
            bad = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= (limits.num_labels or 0)))
            if limits.problem != "multi_label_classification" and bool(bad.any()):
                row, place = _first(bad)
                counted = labels[labels != IGNORE_INDEX]
                low, high = (int(value) for value in torch.aminmax(counted))
                yield outside(int(labels[tuple(place)]), f"labels, row {row} of the batch", low, high, limits)


def no_labels(limits: ModelLimits, names: Sequence[str], left_out: Sequence[str] = ()) -> str:
    """What to do about a batch without labels. `left_out`: columns that the model does not take, and may be them."""
    if limits.predicts_tokens is not None:
        cure = f"Pass data_collator={COLLATOR_OF[limits.predicts_tokens]}."
    elif left_out:
        cure = f'The column {left_out[0]!r} looks like them: dataset.rename_column({left_out[0]!r}, "labels").'
    else:
        cure = 'Give the data set a column "labels" (or "label").'
    return f"The batch has no labels, from which {limits.class_name} computes its loss; it has {list(names)}. {cure}"


def wrong_kind(labels: torch.Tensor, limits: ModelLimits) -> str | None:
    """What is wrong with the type or shape of a classifier's labels; None: nothing."""
    shape, num = tuple(labels.shape), limits.num_labels or 0
    if limits.problem == "multi_label_classification":
        if not labels.is_floating_point():
            return (
                f"labels are {labels.dtype}, and problem_type='multi_label_classification' takes one 0.0 or 1.0 per "
                f"class: float labels of the shape ({shape[0]}, {num})."
            )
        if shape != (shape[0], num):
            return f"labels have the shape {shape}; with several labels per sample it is ({shape[0]}, {num})."
        return None
    if labels.is_floating_point() and num > 1 and shape != (shape[0], num) and limits.problem != "regression":
        return (
            f"labels are numbers ({labels.dtype}, such as {labels.flatten()[0].item():g}), one per "
            f"{'token' if limits.labels_tokens else 'sample'}, and {limits.class_name} with num_labels={num} chooses "
            f"one of {num} classes: give whole numbers 0..{num - 1} (int). For numbers as targets load the model with "
            "num_labels=1."
        )
    return None


def outside(value: int, where: str, low: int, high: int, limits: ModelLimits, names: Sequence[str] = ()) -> str:
    """The error about a class that the model does not have. `names`: of the classes of the data set."""
    num = limits.num_labels or 0
    message = f"{where}: {value} is no class of {limits.class_name}, which has num_labels={num}: 0..{num - 1}"
    message += f" (and {IGNORE_INDEX} for what the loss leaves out)."
    if names and len(names) > num:
        shown = ", ".join(map(repr, names[:8])) + (" ..." if len(names) > 8 else "")
        return f"{message} The data have {len(names)} classes ({shown}): load the model with num_labels={len(names)}."
    if low == 1 and high == num:
        return f"{message} Labels start at 0, and these at 1: subtract 1 from each."
    if low < 0:
        return f"{message} Give unlabelled samples {IGNORE_INDEX}, or leave them out."
    return f"{message} Labels go up to {high}: load the model with num_labels={high + 1}, or correct them."


def _bad_target_tokens(labels: torch.Tensor, limits: ModelLimits) -> Iterator[str]:
    size = limits.target_vocabulary
    if size is None or labels.is_floating_point():
        return
    bad = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= size))
    if bool(bad.any()):
        row, place = _first(bad)
        yield (
            f"labels hold {int(labels[tuple(place)])} in row {row} of the batch, and {limits.class_name} predicts "
            f"{size} tokens: 0..{size - 1} (and {IGNORE_INDEX} for what the loss leaves out). Use the tokenizer of "
            "this model, or, where tokens were added to it, model.resize_token_embeddings(len(tokenizer))."
        )


def _labels_of_another_length(batch: Mapping[str, Any], labels: torch.Tensor) -> Iterator[str]:
    tokens = batch.get("input_ids")
    if isinstance(tokens, torch.Tensor) and tokens.ndim == 2 and tuple(labels.shape) != tuple(tokens.shape):
        yield (
            f"labels have the shape {tuple(labels.shape)} and input_ids {tuple(tokens.shape)}: each token needs a "
            f"label ({IGNORE_INDEX} for special tokens and all but the first part of a word; tokenizer(..., "
            "is_split_into_words=True).word_ids() says which those are). DataCollatorForTokenClassification pads both."
        )


def _first(bad: torch.Tensor) -> tuple[int, list[int]]:
    place = bad.nonzero()[0].tolist()
    return place[0], place


def described(batch: Any) -> str:
    """Names, shapes, types and ranges of a batch, for the note on an error."""
    if not isinstance(batch, Mapping):
        return f"a {type(batch).__name__}"
    return "; ".join(f"{name} {_described(value)}" for name, value in batch.items())


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    text = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if value.numel() and not value.is_complex() and value.device.type == "cpu" and not value.is_sparse:
        low, high = torch.aminmax(value)
        text += f" {low.item():g}..{high.item():g}"
    return text
