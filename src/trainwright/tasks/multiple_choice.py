"""The right one of several answers, from rows to a trained model and its predictions.

Owns: the order of its parts, which columns hold the answers. Leaves to others: batches of several answers a row (the
collator), the arguments (`task_arguments.py`).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from trainwright.args.training import TrainingArguments
from trainwright.data.collate import DataCollatorForMultipleChoice
from trainwright.outputs import PredictionOutput
from trainwright.tasks import checks, models, session, sources
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.classification import metric_for
from trainwright.tasks.errors import DataError
from trainwright.tasks.task_arguments import ChoiceDataArguments
from trainwright.trainer import Trainer

HEAD = "AutoModelForMultipleChoice"


def answers_of(split: sources.Split) -> list[list[str]]:
    """The answers of each row, as many in every row. DataError where a row has another number, or an empty one."""
    columns = sorted(
        (name for name in split.rows.column_names if re.fullmatch(r"ending\d+", name)), key=lambda name: int(name[6:])
    )
    if columns:
        rows = [list(row) for row in zip(*(split.rows[name] for name in columns))]
    else:
        rows = split.rows[checks.pick_column(split, "choices", None, ("choices",), "answers (or ending0, ending1 ...)")]
    for index, row in enumerate(rows):
        if len(row) != len(rows[0]) or len(row) < 2 or not all(row):
            num_empty = sum(not one for one in row)
            raise DataError(
                f"{split.place(index)}: {len(row)} answers, of which {num_empty} empty; the first row has "
                f"{len(rows[0])}. Every question needs the same number of answers, two or more."
            )
    return list(rows)


def right_answers(split: sources.Split, column: str, num_answers: int) -> list[int]:
    numbers = []
    for index, value in enumerate(split.rows[column]):
        if not isinstance(value, (int, float)) or value not in range(num_answers):
            raise DataError(
                f"{split.place(index)}: the label {value!r} (column {column!r}) is no number of an answer: 0 to "
                f"{num_answers - 1}."
            )
        numbers.append(int(value))
    return numbers


def run(model_args: TrainedModelArguments, data: ChoiceDataArguments, args: TrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args)
    splits = sources.load_splits(data, needs=session.needed_splits(args))
    first = next(iter(splits.values()))
    usual = ("sent1", "context", "question")
    context = checks.pick_column(first, "context_column", data.context_column, usual, "the context")
    begin = data.begin_column or ("sent2" if "sent2" in first.rows.column_names else None)
    checks.require_columns(splits.values(), [context] if begin is None else [context, begin])
    config = models.load_config(model_args)
    tokenizer = models.load_processor(model_args)
    models.fit_vocabulary(model_args, config, tokenizer)
    model = models.load_with_adapter(model_args, HEAD, config)
    length = min(data.max_seq_length, tokenizer.model_max_length)

    def prepare(split: sources.Split) -> Any:
        checks.check_filled(split, context)
        answers = answers_of(split)
        num_answers = len(answers[0])

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            begins = batch[begin] if begin is not None else [""] * len(batch[context])
            pairs = [
                (text, f"{start or ''} {answer}".strip())
                for text, start, row in zip(batch[context], begins, batch["answers"])
                for answer in row
            ]
            encoded = tokenizer(*map(list, zip(*pairs)), truncation="only_first", max_length=length)
            return {
                name: [values[i : i + num_answers] for i in range(0, len(values), num_answers)]
                for name, values in encoded.items()
            }

        rows = split.rows.select_columns([context] if begin is None else [context, begin])
        encoded = sources.tokenized(split.with_rows(rows.add_column("answers", answers)), encode, data)
        if split.name == "test":
            return encoded
        label = checks.pick_column(split, "label_column", data.label_column, ("label", "labels"), "the right answer")
        return encoded.add_column("labels", right_answers(split, label, num_answers))

    ready = {name: prepare(split) for name, split in splits.items()}
    trainer = Trainer(
        model,
        args,
        DataCollatorForMultipleChoice(tokenizer),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        compute_metrics=metric_for(None, "single"),
    )

    def write(output: PredictionOutput, directory: str) -> None:
        chosen = np.asarray(output.predictions).argmax(-1)
        session.write_lines(directory, "predictions.txt", list(map(str, chosen)))

    return session.run(
        trainer, data, task="multiple-choice", predict_dataset=ready.get("test"), write_predictions=write
    )
