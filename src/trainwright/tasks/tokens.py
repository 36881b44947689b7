"""Token classification: labels of words aligned with word pieces, and the metric of whole entities.

Owns: CoNLL files, alignment, entity scores. Leaves to others: names of labels (`checks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainwright.names import IGNORE_INDEX
from trainwright.tasks.errors import DataError, package
from trainwright.tasks.sources import Split


def read_conll(path: str) -> dict[str, list[list[str]]]:
    """Columns "tokens" and "labels" of a CoNLL file: a word per line, its label last, sentences apart by empty lines.

    Lines that begin with -DOCSTART- are skipped. Raises DataError at a line without a label.
    """
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            fields = line.split()
            if not fields or fields[0] == "-DOCSTART-":
                if sentences[-1][0]:
                    sentences.append(([], []))
                continue
            if len(fields) < 2:
                raise DataError(f"{path}, line {number}: {line.strip()!r} has a word and no label. Write `word label`.")
            sentences[-1][0].append(fields[0])
            sentences[-1][1].append(fields[-1])
    filled = [pair for pair in sentences if pair[0]]
    return {"tokens": [words for words, _ in filled], "labels": [labels for _, labels in filled]}


def check_lengths(split: Split, tokens: str, labels: str) -> None:
    """Raise DataError at the first row whose words and labels differ in number."""
    for index, (words, tags) in enumerate(zip(split.rows[tokens], split.rows[labels])):
        if len(words) != len(tags):
            raise DataError(
                f"{split.place(index)}: {len(words)} words in {tokens!r} but {len(tags)} labels in {labels!r}. "
                "Each word needs one label, O where it is nothing."
            )


def aligned(word_ids: Sequence[int | None], labels: Sequence[int], every_piece: bool = False) -> list[int]:
    """A label for each piece: that of its word at the word's first piece (or `every_piece`), -100 elsewhere.

    >>> aligned([None, 0, 0, 1, None], [3, 5])
    [-100, 3, -100, 5, -100]
    """
    found, before = [], None
    for word in word_ids:
        is_target = word is not None and (every_piece or word != before)
        found.append(labels[word] if is_target and word is not None else IGNORE_INDEX)
        before = word
    return found


def entity_scores(names: Sequence[str], each_entity: bool = False) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics`: precision, recall and F1 of whole entities (IOB labels) and accuracy of tokens, by seqeval.

    Predictions (samples, seq, labels). each_entity: also for each kind of entity.
    """

    def compute(prediction: Any) -> dict[str, float]:
        scores = package("seqeval.metrics")
        chosen, truth = words_of(names, prediction.predictions.argmax(-1), prediction.label_ids)
        result = {
            "precision": float(scores.precision_score(truth, chosen, zero_division=0)),
            "recall": float(scores.recall_score(truth, chosen, zero_division=0)),
            "f1": float(scores.f1_score(truth, chosen, zero_division=0)),
            "accuracy": float(scores.accuracy_score(truth, chosen)),
        }
        if each_entity:
            report = scores.classification_report(truth, chosen, output_dict=True, zero_division=0)
            for kind, values in report.items():
                if " avg" not in kind:
                    result[f"{kind}_f1"] = float(values["f1-score"])
        return result

    return compute


def words_of(
    names: Sequence[str], chosen: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> tuple[list[list[str]], list[list[str]]]:
    """Names of the predicted and the true labels where a label counts, a list per sample. Both (samples, seq)."""
    counts = labels != IGNORE_INDEX
    return (
        [[names[number] for number in row[mask]] for row, mask in zip(chosen, counts)],
        [[names[number] for number in row[mask]] for row, mask in zip(labels, counts)],
    )
