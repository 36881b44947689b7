"""Choose the right one of several answers: SWAG, or your own questions.

    python examples/multiple_choice.py --model_name_or_path bert-base-cased --dataset_name swag \
        --dataset_config_name regular --do_train --do_eval --output_dir out
    python examples/multiple_choice.py --model_name_or_path my-model --train_file train.csv \
        --validation_file valid.csv --do_train --do_eval --output_dir out
    python examples/multiple_choice.py settings.yaml --plan

Data: a context ("sent1", "context" or "question"), optionally the words every answer begins with ("sent2"), the answers
("ending0", "ending1", ... or a list in "choices"), and "label": the number of the right one, from 0. Metric: accuracy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from trainwright import DataCollatorForMultipleChoice, Trainer, TrainingArguments
from trainwright.args.options import option
from trainwright.tasks import checks, models, session, sources
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.classification import metric_for
from trainwright.tasks.errors import DataError, as_script


@dataclass
class ChoiceDataArguments(DataArguments):
    """The questions and their answers."""

    context_column: str | None = option(None, "Column of the context. None: sent1, context or question.")
    begin_column: str | None = option(None, "Column of words that every answer begins with. None: sent2, if there.")
    label_column: str | None = option(None, "Column of the right answer's number. None: label.")
    max_seq_length: int = option(128, "Tokens of a context with one answer; the rest of the context is cut off.")


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


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, ChoiceDataArguments, TrainingArguments), __doc__, arguments)
    session.begin(args)
    splits = sources.load_splits(data, needs=session.needed_splits(args))
    first = next(iter(splits.values()))
    usual = ("sent1", "context", "question")
    context = checks.pick_column(first, "context_column", data.context_column, usual, "the context")
    begin = data.begin_column or ("sent2" if "sent2" in first.rows.column_names else None)
    checks.require_columns(splits.values(), [context] if begin is None else [context, begin])
    tokenizer = models.load_processor(model_args)
    model = models.load_model(model_args, "AutoModelForMultipleChoice", models.load_config(model_args))

    def prepare(split: sources.Split) -> object:
        checks.check_filled(split, context)
        answers = answers_of(split)
        rows = split.rows.select_columns([context] if begin is None else [context, begin]).add_column(
            "answers", answers
        )

        def encode(batch: dict) -> dict:
            begins = batch[begin] if begin is not None else [""] * len(batch[context])
            pairs = [
                (text, f"{start or ''} {answer}".strip())
                for text, start, row in zip(batch[context], begins, batch["answers"])
                for answer in row
            ]
            length = min(data.max_seq_length, tokenizer.model_max_length)
            encoded = tokenizer(*map(list, zip(*pairs)), truncation="only_first", max_length=length)
            size = len(answers[0])
            return {
                name: [values[i : i + size] for i in range(0, len(values), size)] for name, values in encoded.items()
            }

        encoded = rows.map(
            encode,
            batched=True,
            num_proc=data.preprocessing_num_workers,
            load_from_cache_file=not data.overwrite_cache,
            remove_columns=rows.column_names,
            desc=f"Tokenizing {split.name}",
        )
        if split.name == "test":
            return encoded
        label = checks.pick_column(split, "label_column", data.label_column, ("label", "labels"), "the right answer")
        return encoded.add_column("labels", right_answers(split, label, len(answers[0])))

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

    def write(output: object, directory: str) -> None:
        chosen = map(str, output.predictions.argmax(-1))
        Path(directory, "predictions.txt").write_text("\n".join(chain(chosen, [""])), encoding="utf-8")

    return session.run(
        trainer, data, task="multiple-choice", predict_dataset=ready.get("test"), write_predictions=write
    )


if __name__ == "__main__":
    as_script(main)
