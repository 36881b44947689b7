"""Extractive question answering: contexts cut into windows, spans chosen from logits, SQuAD's scores.

Owns: reading SQuAD files, windows with the place of the answer, `best_spans`, `best_beam_spans`, exact match and F1.
Leaves to others: the model, the Trainer subclass (`answer_trainer.py`). Source of the scores: Rajpurkar et al. 2016,
section 6.1; of the score without an answer: Rajpurkar et al. 2018.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainwright.tasks.errors import DataError
from trainwright.tasks.sources import Split

Array = np.ndarray[Any, Any]


def read_squad(path: str) -> dict[str, list[Any]]:
    """Columns id, question, context, answers of a SQuAD json file (articles of paragraphs), or of flat rows."""
    with open(path, encoding="utf-8") as file:
        try:
            found = json.load(file)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is no JSON: {error}. A file with one object per line is called .jsonl.") from None
    rows = found.get("data", found) if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} holds no list of questions, nor one under 'data'.")
    flat = []
    for row in rows:
        if "paragraphs" not in row:
            flat.append(row)
            continue
        for paragraph in row["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers") or []
                flat.append(
                    {
                        "id": question["id"],
                        "question": question["question"],
                        "context": paragraph["context"],
                        "answers": {
                            "text": [one["text"] for one in answers],
                            "answer_start": [one["answer_start"] for one in answers],
                        },
                    }
                )
    return {name: [row.get(name) for row in flat] for name in (flat[0] if flat else ())}


@dataclass
class Question:
    """One row: question, context, and its answers (character positions); none: no answer."""

    key: str
    question: str
    context: str
    texts: list[str]
    starts: list[int]


def questions_of(split: Split, *, has_answers: bool = True) -> list[Question]:
    """The rows of `split`, with the position of each answer checked.

    Answers come in "answers" ({"text": [...], "answer_start": [...]}), or as one text in "answer", whose first
    occurrence in the context counts. Raises DataError at the first row whose answer does not lie in its context.
    """
    found = []
    for index, row in enumerate(split.rows):
        for name in ("question", "context"):
            if not row.get(name):
                raise DataError(f"{split.place(index)}: there is no {name!r}; columns are {list(row)}.")
        texts, starts = _answers_in(row, split, index) if has_answers else ([], [])
        found.append(Question(str(row.get("id") or index), row["question"].strip(), row["context"], texts, starts))
    return found


def _answers_in(row: dict[str, Any], split: Split, index: int) -> tuple[list[str], list[int]]:
    if row.get("answers") is not None:
        texts, starts = list(row["answers"]["text"]), list(row["answers"]["answer_start"])
    elif "answer" in row:
        texts = [row["answer"]] if row["answer"] else []
        starts = [row["context"].find(text) for text in texts]
    else:
        raise DataError(f"{split.place(index)}: there is no 'answers' nor 'answer'; columns are {list(row)}.")
    for text, start in zip(texts, starts):
        there = row["context"][max(start, 0) : max(start, 0) + len(text)]
        if start < 0 or there != text:
            where = f"at character {start} stands {there!r}" if start >= 0 else "it does not occur there"
            raise DataError(
                f"{split.place(index)}: the answer {text!r} is not in its context: {where}. Correct the row."
            )
    return texts, starts


def windows(
    questions: Sequence[Question], tokenizer: Any, *, max_length: int, stride: int, with_positions: bool
) -> dict[str, list[Any]]:
    """Questions with every window of their contexts, as columns; windows overlap by `stride` tokens.

    Besides what the model takes: "question_index", "offsets" (a pair of characters per token of the context, else
    None), "cls_index" and "p_mask" (1 where no answer can begin) for heads that search, and `with_positions`
    "start_positions", "end_positions": tokens of the first answer, or the [CLS] token where the window does not hold it
    whole; then "is_impossible" is 1.
    """
    pad_right = tokenizer.padding_side == "right"
    first, second = ([q.question for q in questions], [q.context for q in questions])
    encoded = tokenizer(
        *((first, second) if pad_right else (second, first)),
        truncation="only_second" if pad_right else "only_first",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )
    of_question = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    columns = {name: list(values) for name, values in encoded.items()}
    context_side = 1 if pad_right else 0
    columns["question_index"] = list(of_question)
    columns |= {"offsets": [], "cls_index": [], "p_mask": []}
    positions: list[tuple[int, int]] = []
    for number, pairs in enumerate(offsets):
        sides = encoded.sequence_ids(number)
        places = [tuple(pair) if side == context_side else None for pair, side in zip(pairs, sides)]
        cls = columns["input_ids"][number].index(tokenizer.cls_token_id)
        columns["offsets"].append(places)
        columns["cls_index"].append(cls)
        columns["p_mask"].append([float(place is None and token != cls) for token, place in enumerate(places)])
        question = questions[of_question[number]]
        positions.append(_tokens_of_answer(places, question) or (cls, cls))
    if with_positions:
        columns["start_positions"] = [start for start, _ in positions]
        columns["end_positions"] = [end for _, end in positions]
        columns["is_impossible"] = [float(start == cls) for (start, _), cls in zip(positions, columns["cls_index"])]
    return columns


def _tokens_of_answer(places: Sequence[tuple[int, int] | None], question: Question) -> tuple[int, int] | None:
    """First and last token of the first answer, None where this window does not hold all of it."""
    if not question.starts:
        return None
    begin, end = question.starts[0], question.starts[0] + len(question.texts[0])
    inside = [token for token, place in enumerate(places) if place and place[0] < end and place[1] > begin]
    covers = [token for token, place in enumerate(places) if place and place[1] > place[0]]
    if not inside or places[covers[0]][0] > begin or places[covers[-1]][1] < end:  # type: ignore[index]
        return None
    return inside[0], inside[-1]


@dataclass
class SpanSettings:
    """How a span is chosen. "No answer" wins where its score is higher by more than `null_score_diff_threshold`."""

    n_best: int = 20
    max_answer_length: int = 30  # tokens
    may_have_no_answer: bool = False
    null_score_diff_threshold: float = 0.0


def best_spans(
    questions: Sequence[Question], features: Any, logits: tuple[Array, Array], settings: SpanSettings
) -> list[str]:
    """The answer to each question: the text of the likeliest span over all its windows, "" for none.

    `features`: rows with "question_index", "offsets" and "input_ids"; `logits`: of starts and ends, (windows, seq).
    """
    starts, ends = logits[:2]
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    null = [np.inf] * len(questions)
    for number, (question_index, places) in enumerate(zip(features["question_index"], features["offsets"])):
        width = len(places)
        start, end = starts[number, :width], ends[number, :width]
        inside = np.array([place is not None for place in places])
        null_place = int(np.argmin(inside))  # [CLS], the first token that is not of the context
        null[question_index] = min(null[question_index], float(start[null_place] + end[null_place]))
        first = [t for t in np.argsort(-start)[: settings.n_best] if inside[t]]
        last = [t for t in np.argsort(-end)[: settings.n_best] if inside[t]]
        for s in first:
            for e in last:
                if s <= e < s + settings.max_answer_length and start[s] + end[e] > best[question_index][0]:
                    text = questions[question_index].context[places[s][0] : places[e][1]]
                    best[question_index] = (float(start[s] + end[e]), text)
    return _with_no_answer(best, null, settings)


def best_beam_spans(
    questions: Sequence[Question], features: Any, outputs: Sequence[Array], settings: SpanSettings
) -> list[str]:
    """As `best_spans`, from a head that searches: (probabilities of starts, starts, probabilities of ends, ends, logit
    of "no answer"), starts (windows, num_starts), ends (windows, num_ends * num_starts), for each end all starts.
    """
    start_scores, start_tokens, end_scores, end_tokens, no_answer = outputs[:5]
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    null = [np.inf] * len(questions)
    num_starts = start_tokens.shape[1]
    num_ends = end_tokens.shape[1] // num_starts
    for number, (question_index, places) in enumerate(zip(features["question_index"], features["offsets"])):
        null[question_index] = min(null[question_index], float(1 / (1 + np.exp(-no_answer[number]))))
        for i in range(num_starts):
            for j in range(num_ends):
                k = j * num_starts + i
                s, e = int(start_tokens[number, i]), int(end_tokens[number, k])
                score = float(start_scores[number, i] * end_scores[number, k])
                if not (s <= e < s + settings.max_answer_length) or places[s] is None or places[e] is None:
                    continue
                if score > best[question_index][0]:
                    text = questions[question_index].context[places[s][0] : places[e][1]]
                    best[question_index] = (score, text)
    return _with_no_answer(best, null, settings)


def _with_no_answer(best: list[tuple[float, str]], null: list[float], settings: SpanSettings) -> list[str]:
    if not settings.may_have_no_answer:
        return [text for _, text in best]
    return ["" if n - score > settings.null_score_diff_threshold else text for (score, text), n in zip(best, null)]


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and needless spaces: what SQuAD compares."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def overlap_f1(answer: str, truth: str) -> float:
    """F1 of the words two texts share, in [0, 1]; where one is empty, whether both are."""
    words, true_words = normalized(answer).split(), normalized(truth).split()
    if not words or not true_words:
        return float(words == true_words)
    shared = sum((Counter(words) & Counter(true_words)).values())
    return 2 * shared / (len(words) + len(true_words))


def squad_scores(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Exact match and F1 in percent, each with the best of the true answers; with unanswerable questions also apart."""

    def scores(pairs: Sequence[tuple[str, Question]]) -> dict[str, float]:
        exact = [max(float(normalized(a) == normalized(t)) for t in q.texts or [""]) for a, q in pairs]
        f1 = [max(overlap_f1(a, t) for t in q.texts or [""]) for a, q in pairs]
        return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}

    pairs = list(zip(answers, questions))
    result = scores(pairs)
    for name, part in (
        ("has_answer", [p for p in pairs if p[1].texts]),
        ("no_answer", [p for p in pairs if not p[1].texts]),
    ):
        if part and len(part) < len(pairs):
            result |= {f"{name}_{key}": value for key, value in scores(part).items()}
    return result


PostProcess = Callable[[Sequence[Question], Any, Any], list[str]]
