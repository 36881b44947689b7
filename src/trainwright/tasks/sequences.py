"""Text to text: translation, summaries, generated answers: texts to tokens, tokens to texts, their scores.

Owns: `encoded_pairs`, `decoded`, BLEU and ROUGE by the packages that define them. Leaves to others: generating
(`Seq2SeqTrainer`), reading rows (`sources.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainwright.args.seq2seq import Seq2SeqTrainingArguments
from trainwright.names import IGNORE_INDEX
from trainwright.tasks.errors import DataError, package


def encoded_pairs(
    sources: Sequence[str],
    targets: Sequence[str] | None,
    tokenizer: Any,
    *,
    max_source_length: int,
    max_target_length: int,
    prefix: str = "",
) -> dict[str, list[Any]]:
    """Columns of tokens of `sources` (each after `prefix`) and "labels", tokens of `targets`; longer ones are cut."""
    columns = dict(tokenizer([prefix + text for text in sources], truncation=True, max_length=max_source_length))
    if targets is not None:
        labels = tokenizer(text_target=list(targets), truncation=True, max_length=max_target_length)
        columns["labels"] = labels["input_ids"]
    return columns


def check_generates(args: Seq2SeqTrainingArguments) -> None:
    """Raise DataError where texts are to be predicted and none are generated."""
    if args.do_predict and not args.predict_with_generate:
        raise DataError(
            "What is predicted are generated texts, and predict_with_generate is off. "
            "Give --predict_with_generate true, or --do_predict false."
        )


def decoded(tokenizer: Any, tokens: np.ndarray[Any, Any]) -> list[str]:
    """Texts of `tokens` (samples, seq), where -100 is padding."""
    tokens = np.where(tokens == IGNORE_INDEX, tokenizer.pad_token_id, tokens)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def bleu(tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics`: sacreBLEU's corpus BLEU (0 to 100) and the mean length of what was generated, in tokens."""

    def compute(prediction: Any) -> dict[str, float]:
        sacrebleu = package("sacrebleu")
        found, truth = decoded(tokenizer, prediction.predictions), decoded(tokenizer, prediction.label_ids)
        return {
            "bleu": float(sacrebleu.corpus_bleu(found, [truth]).score),
            "gen_len": _mean_length(tokenizer, prediction),
        }

    return compute


def rouge(tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics`: mean F1 of ROUGE-1, -2, -L and -Lsum in percent, and the mean length in tokens.

    ROUGE-Lsum compares line by line: texts are put one sentence a line first.
    """

    def compute(prediction: Any) -> dict[str, float]:
        scorer = package("rouge_score.rouge_scorer")
        kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        score = scorer.RougeScorer(kinds, use_stemmer=True).score
        found, truth = decoded(tokenizer, prediction.predictions), decoded(tokenizer, prediction.label_ids)
        rows = [score(_by_sentence(true), _by_sentence(text)) for text, true in zip(found, truth)]
        result = {kind: 100 * float(np.mean([row[kind].fmeasure for row in rows])) for kind in kinds}
        return {**result, "gen_len": _mean_length(tokenizer, prediction)}

    return compute


def _by_sentence(text: str) -> str:
    return re.sub(r"(?<=[.!?])\s+", "\n", text)


def _mean_length(tokenizer: Any, prediction: Any) -> float:
    tokens = prediction.predictions
    return float(((tokens != tokenizer.pad_token_id) & (tokens != IGNORE_INDEX)).sum(axis=1).mean())
