"""Find the answer to a question in a text: SQuAD 1.1 and 2.0, or your own questions. Spans, or spans by beam search.

    python examples/question_answering.py --model_name_or_path bert-base-cased --dataset_name squad \
        --do_train --do_eval --output_dir out
    python examples/question_answering.py --model_name_or_path xlnet-base-cased --beam_search \
        --train_file train-v2.0.json --version_2_with_negative --do_train --output_dir out
    python examples/question_answering.py settings.yaml --plan

Data: SQuAD's json; or json, jsonl, csv with "question", "context" and "answers" ({"text": [...], "answer_start":
[...]}) or "answer" (a text that stands in the context; empty: no answer). Metrics: exact match and F1, in percent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trainwright import TrainingArguments, default_data_collator
from trainwright.args.checks import check_number
from trainwright.args.options import option
from trainwright.tasks import answers, models, session, sources
from trainwright.tasks.answer_trainer import AnswerTrainer
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.errors import DataError, as_script, package

BEAM_MODELS = {"xlnet": "XLNetForQuestionAnswering", "xlm": "XLMForQuestionAnswering"}


@dataclass
class AnswerDataArguments(DataArguments):
    """The questions, and how answers are chosen."""

    max_seq_length: int = option(384, "Tokens of a question with one window of its text.")
    doc_stride: int = option(128, "Tokens by which neighbouring windows of a long text overlap.")
    version_2_with_negative: bool = option(False, "Some questions have no answer (SQuAD 2.0).")
    null_score_diff_threshold: float = option(0.0, "'No answer' wins where its score is higher by more than this.")
    n_best_size: int = option(20, "Likeliest starts and ends that are combined.")
    max_answer_length: int = option(30, "Tokens of an answer at most.")
    beam_search: bool = option(False, "A head that chooses ends for each likely start (XLNet, XLM).")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_seq_length", "n_best_size", "max_answer_length"):
            check_number(self, name, 1, whole=True)
        check_number(self, "doc_stride", 0, whole=True)
        if self.doc_stride >= self.max_seq_length:
            raise ValueError(
                f"doc_stride={self.doc_stride}, the overlap of windows, must be smaller than "
                f"max_seq_length={self.max_seq_length}."
            )


def head_for(data: AnswerDataArguments, config: object) -> str:
    if not data.beam_search:
        return "AutoModelForQuestionAnswering"
    if config.model_type not in BEAM_MODELS:
        raise DataError(f"beam_search needs one of {list(BEAM_MODELS)}; this model is a {config.model_type}.")
    return BEAM_MODELS[config.model_type]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, AnswerDataArguments, TrainingArguments), __doc__, arguments)
    session.begin(args)
    splits = sources.load_splits(data, needs=session.needed_splits(args), readers={".json": answers.read_squad})
    config = models.load_config(model_args)
    tokenizer = models.load_processor(model_args, use_fast=True)
    if not tokenizer.is_fast:
        raise DataError("This task needs a fast tokenizer (tokenizer.json), which knows the place of each token.")
    model = models.load_model(model_args, head_for(data, config), config)

    questions = {name: answers.questions_of(split, has_answers=name != "test") for name, split in splits.items()}
    for name in questions.keys() - {"test"}:
        unanswered = next((q for q in questions[name] if not q.texts), None)
        if unanswered is not None and not data.version_2_with_negative:
            raise DataError(
                f"{splits[name].origin}: the question {unanswered.key!r} has no answer. "
                "Use --version_2_with_negative where that is meant."
            )
    longest = min(data.max_seq_length, tokenizer.model_max_length)
    features = {
        name: answers.windows(
            asked, tokenizer, max_length=longest, stride=data.doc_stride,
            with_positions=name == "train" or (name == "validation" and not data.beam_search),
        )
        for name, asked in questions.items()
    }  # fmt: skip
    hidden = {"question_index", "offsets"} | (set() if data.version_2_with_negative else {"is_impossible", "cls_index"})
    ready = {
        name: package("datasets").Dataset.from_dict(
            {key: values for key, values in columns.items() if key not in hidden}
        )
        for name, columns in features.items()
    }
    choose = answers.best_beam_spans if data.beam_search else answers.best_spans
    settings = answers.SpanSettings(
        data.n_best_size, data.max_answer_length, data.version_2_with_negative, data.null_score_diff_threshold
    )
    trainer = AnswerTrainer(
        model,
        args,
        default_data_collator,
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        eval_questions=questions.get("validation"),
        eval_features=features.get("validation"),
        post_process=lambda asked, columns, outputs: choose(asked, columns, outputs, settings),
    )

    def write(output: object, directory: str) -> None:
        found = {question.key: answer for question, answer in zip(questions["test"], output.predictions)}
        Path(directory, "predictions.json").write_text(
            json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    return session.run(
        trainer,
        data,
        task="question-answering",
        predict_dataset=ready.get("test"),
        predict_options={"questions": questions.get("test"), "features": features.get("test")},
        write_predictions=write,
        plan_rows=[("questions", ", ".join(f"{len(asked):,} {name}" for name, asked in questions.items()))],
    )


if __name__ == "__main__":
    as_script(main)
