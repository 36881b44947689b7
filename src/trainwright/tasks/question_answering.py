"""The place of an answer in a text, from questions to a trained model and its answers.

Owns: the order of its parts, which head there is. Leaves to others: windows, the choice of a span and scores
(`answers.py`), evaluating them (`answer_trainer.py`), the arguments (`task_arguments.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trainwright.args.training import TrainingArguments
from trainwright.data.collate import default_data_collator
from trainwright.outputs import PredictionOutput
from trainwright.tasks import answers, models, session, sources
from trainwright.tasks.answer_trainer import AnswerTrainer
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.errors import DataError, package
from trainwright.tasks.task_arguments import AnswerDataArguments

BEAM_MODELS = {"xlnet": "XLNetForQuestionAnswering", "xlm": "XLMForQuestionAnswering"}


def head_for(data: AnswerDataArguments, config: Any) -> str:
    if not data.beam_search:
        return "AutoModelForQuestionAnswering"
    if config.model_type not in BEAM_MODELS:
        raise DataError(f"beam_search needs one of {list(BEAM_MODELS)}; this model is a {config.model_type}.")
    return BEAM_MODELS[config.model_type]


def questions_of(splits: dict[str, sources.Split], data: AnswerDataArguments) -> dict[str, list[answers.Question]]:
    """The questions of each part. DataError at one without an answer, unless some may have none; a test set need not
    have answers.
    """
    found = {}
    for name, split in splits.items():
        found[name] = answers.questions_of(split, has_answers=name != "test")
        unanswered = next((one for one in found[name] if not one.texts), None)
        if unanswered is not None and name != "test" and not data.version_2_with_negative:
            raise DataError(
                f"{split.origin}: the question {unanswered.key!r} has no answer. "
                "Use --version_2_with_negative where that is meant."
            )
    return found


def run(model_args: TrainedModelArguments, data: AnswerDataArguments, args: TrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args)
    splits = sources.load_splits(data, needs=session.needed_splits(args), readers={".json": answers.read_squad})
    questions = questions_of(splits, data)
    config = models.load_config(model_args)
    head = head_for(data, config)
    tokenizer = models.load_fast_tokenizer(model_args, "the place of each token in its text")
    models.fit_vocabulary(model_args, config, tokenizer)
    model = models.load_with_adapter(model_args, head, config)

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
    settings = answers.SpanSettings(
        data.n_best_size, data.max_answer_length, data.version_2_with_negative, data.null_score_diff_threshold
    )

    def choose(asked: Sequence[answers.Question], columns: Any, outputs: Any) -> list[str]:
        if data.beam_search:
            return answers.best_beam_spans(asked, columns, outputs, settings)
        return answers.best_spans(asked, columns, outputs, settings)

    trainer = AnswerTrainer(
        model,
        args,
        default_data_collator,
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        eval_questions=questions.get("validation"),
        eval_features=features.get("validation"),
        post_process=choose,
    )

    def write(output: PredictionOutput, directory: str) -> None:
        found = {question.key: answer for question, answer in zip(questions["test"], output.predictions)}
        session.write_lines(directory, "predictions.json", [json.dumps(found, indent=2, ensure_ascii=False)])

    return session.run(
        trainer,
        data,
        task="question-answering",
        predict_dataset=ready.get("test"),
        predict_options={"questions": questions.get("test"), "features": features.get("test")},
        write_predictions=write,
        plan_rows=[("questions", ", ".join(f"{len(asked):,} {name}" for name, asked in questions.items()))],
    )
