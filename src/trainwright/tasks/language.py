"""Language modelling: texts to blocks of tokens, and the metrics of each objective.

Owns: `tokenized_blocks`, perplexity, accuracy over the positions that count. Leaves to others: masking (the
collators), reading texts (`sources.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from trainwright.names import IGNORE_INDEX
from trainwright.tasks.arguments import DataArguments
from trainwright.tasks.sources import Split, tokenized


def tokenized_blocks(
    split: Split,
    tokenizer: Any,
    column: str,
    *,
    block_size: int,
    by_line: bool = False,
    multiple_of: int = 1,
    data: DataArguments | None = None,
) -> Any:
    """The texts of `column` as rows of at most `block_size` tokens in "input_ids".

    Empty texts are left out. by_line: each text is a separate row, cut to `block_size`. Otherwise texts are joined
    and cut, 1000 at a time, so that rows are full; the last of each thousand is shorter, and no token is lost but
    what `multiple_of` (2 for permutations, which need an even length) cuts off.
    """

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch[column] if text and not text.isspace()]
        if not texts:
            rows = []
        elif by_line:
            rows = tokenizer(texts, truncation=True, max_length=block_size)["input_ids"]
        else:
            encoded = tokenizer(texts)["input_ids"]
            tokens = list(chain.from_iterable(encoded))
            rows = [tokens[start : start + block_size] for start in range(0, len(tokens), block_size)]
        cut = [row[: len(row) // multiple_of * multiple_of] for row in rows]
        return {"input_ids": [row for row in cut if len(row) > 1]}  # one token alone predicts nothing

    return tokenized(split, tokenize, data)


def with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    """`metrics` with "perplexity", e to the evaluation loss (nats per token); infinite where that is too large."""
    try:
        perplexity = math.exp(metrics["eval_loss"])
    except OverflowError:
        perplexity = math.inf
    return {**metrics, "perplexity": perplexity}


def best_tokens(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics`: (batch, seq, vocab) to (batch, seq), so that logits need not be kept."""
    first = logits[0] if isinstance(logits, tuple) else logits
    return first.argmax(-1)  # type: ignore[no-any-return]


def token_accuracy(is_causal: bool) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics`: share of the target tokens that were predicted. A causal model predicts the next token."""

    def compute(prediction: Any) -> dict[str, float]:
        chosen, labels = prediction.predictions, prediction.label_ids
        if is_causal:
            chosen, labels = chosen[:, :-1], labels[:, 1:]
        counts = labels != IGNORE_INDEX
        return {"accuracy": float((chosen == labels)[counts].mean()) if counts.any() else 0.0}

    return compute
