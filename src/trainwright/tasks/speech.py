"""Speech recognition and speech pretraining: alphabets, word error rate, masked steps and distractors.

Owns: `alphabet_of`, `word_error_rate`, `SpeechPretrainingCollator`. Leaves to others: reading sound (`audio.py`).
Source of hidden steps and distractors: Baevski et al. 2020 (wav2vec 2.0), sections 3.1, 3.2 and 4.2.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from trainwright.interop.optional import require
from trainwright.names import IGNORE_INDEX
from trainwright.tasks.errors import package
from trainwright.tasks.sequences import decoded

Array = np.ndarray[Any, Any]
WORD_END, UNKNOWN, PADDING = "|", "[UNK]", "[PAD]"


def normalized(text: str, remove: str | None = None) -> str:
    """Lower case, without the characters in `remove`, one space between words."""
    if remove:
        text = re.sub(f"[{re.escape(remove)}]", "", text)
    return " ".join(text.lower().split())


def alphabet_of(texts: Sequence[str]) -> Any:
    """A tokenizer of the letters in `texts` for a CTC model. Padding is CTC's blank."""
    letters = sorted(set("".join(texts)) - {" "})
    tokenizer_class = require("transformers", "Speech recognition", extra="transformers").Wav2Vec2CTCTokenizer
    with tempfile.TemporaryDirectory() as directory:  # the class reads its letters from a file
        path = os.path.join(directory, "vocab.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump({letter: n for n, letter in enumerate([*letters, WORD_END, UNKNOWN, PADDING])}, file)
        return tokenizer_class(path, unk_token=UNKNOWN, pad_token=PADDING, word_delimiter_token=WORD_END)


def transcripts(tokenizer: Any, tokens: Array, *, is_ctc: bool, repeats: bool = False) -> list[str]:
    """Texts of `tokens` (samples, steps), -100 being padding. CTC: a letter that is predicted several times in a row
    is one; those of a true text are several (`repeats`).
    """
    if not is_ctc:
        return decoded(tokenizer, tokens)
    tokens = np.where(tokens == IGNORE_INDEX, tokenizer.pad_token_id, tokens)
    return list(tokenizer.batch_decode(tokens, group_tokens=not repeats))


def word_error_rate(tokenizer: Any, *, is_ctc: bool) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics`: words and characters that are wrong, missing or too many, as shares of the true ones."""

    def compute(prediction: Any) -> dict[str, float]:
        jiwer = package("jiwer")
        found = transcripts(tokenizer, prediction.predictions, is_ctc=is_ctc)
        truth = transcripts(tokenizer, prediction.label_ids, is_ctc=is_ctc, repeats=True)
        pairs = [(text, true) for text, true in zip(found, truth) if true.strip()]  # no word: no rate
        if not pairs:
            return {"wer": 0.0, "cer": 0.0}
        found, truth = map(list, zip(*pairs))
        return {"wer": float(jiwer.wer(truth, found)), "cer": float(jiwer.cer(truth, found))}

    return compute


class SpeechPretrainingCollator:
    """Batches for wav2vec 2.0: sounds, which steps are masked, and distractors from the same sound.

    Steps are outputs of the convolutions. Spans of `span` steps are masked, about `mask_prob` of all; for each masked
    step `num_negatives` other masked steps of the same sound are drawn, by NumPy's global generator.
    """

    def __init__(self, extractor: Any, model: Any, mask_prob: float, span: int) -> None:
        self.extractor, self.mask_prob, self.span = extractor, mask_prob, span
        self.num_steps = model._get_feat_extract_output_lengths
        self.num_negatives = int(model.config.num_negatives)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sounds = [row["sound"] for row in rows]
        batch = self.extractor(
            sounds, sampling_rate=self.extractor.sampling_rate, padding=True, return_attention_mask=True,
            return_tensors="pt",
        )  # fmt: skip
        lengths = [int(self.num_steps(len(sound))) for sound in sounds]
        num_steps = int(self.num_steps(batch["input_values"].shape[1]))
        hidden = np.zeros((len(rows), num_steps), bool)
        negatives = np.zeros((len(rows), num_steps, self.num_negatives), np.int64)
        for number, length in enumerate(lengths):
            hidden[number, :length] = hidden_steps(length, self.mask_prob, self.span)
            negatives[number] = distractors(hidden[number], self.num_negatives) + number * num_steps
        return {
            "input_values": batch["input_values"],
            "attention_mask": batch["attention_mask"],
            "mask_time_indices": torch.from_numpy(hidden),
            "sampled_negative_indices": torch.from_numpy(negatives),
        }


def hidden_steps(length: int, mask_prob: float, span: int) -> Array:
    """Which of `length` steps are masked, (length,) of booleans: spans that begin anywhere and may overlap; at least
    two steps, so that each has a distractor.
    """
    span = min(span, length)
    number = max(1, round(mask_prob * length / span))
    hidden = np.zeros(length, bool)
    for start in np.random.choice(length - span + 1, size=min(number, length - span + 1), replace=False):
        hidden[start : start + span] = True
    if hidden.sum() < 2:
        hidden[:2] = True
    return hidden


def distractors(hidden: Array, number: int) -> Array:
    """For each step `number` other masked steps, (steps, number); 0 where a step is not masked. Source: section 3.2."""
    places = np.flatnonzero(hidden)
    result = np.zeros((len(hidden), number), np.int64)
    draws = np.random.randint(0, len(places) - 1, (len(places), number))
    draws += draws >= np.arange(len(places))[:, None]  # never the step itself
    result[places] = places[draws]
    return result
