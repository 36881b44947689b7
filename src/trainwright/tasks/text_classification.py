"""Classifying texts or pairs of texts, from rows to a trained model and its predictions.

Owns: the order of its parts, which columns are texts, what kind of label there is. Leaves to others: metrics
(`classification.py`), the arguments (`task_arguments.py`).
"""

from __future__ import annotations

from typing import Any

from trainwright.args.training import TrainingArguments
from trainwright.data.collate import DataCollatorWithPadding
from trainwright.tasks import checks, models, session, sources
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.classification import metric_for, predictions_writer, task_columns
from trainwright.tasks.task_arguments import TextDataArguments
from trainwright.trainer import Trainer

USUAL_TEXTS = ("sentence", "text", "sentence1", "premise", "question")
HEAD = "AutoModelForSequenceClassification"
PROBLEM_TYPES = {
    "single": "single_label_classification",
    "several": "multi_label_classification",
    "number": "regression",
}


def read(data: TextDataArguments, args: TrainingArguments) -> dict[str, sources.Split]:
    splits = sources.load_splits(data, needs=session.needed_splits(args))
    if data.task_name == "xnli" and data.train_language not in (None, data.language) and data.dataset_name:
        other = TextDataArguments(dataset_name=data.dataset_name, dataset_config_name=data.train_language)
        splits["train"] = sources.load_splits(other)["train"]
    return splits


def text_columns(data: TextDataArguments, split: sources.Split) -> list[str]:
    usual = task_columns(data.task_name) if data.task_name else USUAL_TEXTS
    names = usual[:1] if data.task_name else usual
    first = checks.pick_column(split, "text_column", data.text_column, names, "the text")
    second = data.second_text_column
    if second is None:
        candidates = usual[1:] if data.task_name else ("sentence2", "hypothesis")
        second = next((name for name in candidates if name in split.rows.column_names), None)
    return [first] if second is None else [first, checks.pick_column(split, "second_text_column", second, (), "")]


def read_labels(data: TextDataArguments, splits: list[sources.Split]) -> tuple[str, list[str] | None, str]:
    """(column, names of the classes or None for numbers, kind: "single", "several" or "number")."""
    label = checks.shared_column(splits, "label_column", data.label_column, ("label", "labels"), "the label")
    for split in splits:
        checks.check_filled(split, label)
        if data.label_separator:
            cells = [[one for one in str(cell).split(data.label_separator) if one] for cell in split.rows[label]]
            split.rows = split.rows.remove_columns(label).add_column(label, cells)
    names = checks.label_names(splits[0], label)
    if isinstance(splits[0].rows[0][label], list):
        return label, names, "several"
    return label, names, "number" if names is None else "single"


def run(model_args: TrainedModelArguments, data: TextDataArguments, args: TrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args)
    splits = read(data, args)
    first = next(iter(splits.values()))
    texts = text_columns(data, first)
    checks.require_columns(splits.values(), texts)
    for split in splits.values():
        for column in texts:
            checks.check_filled(split, column)
    labelled = [split for split in splits.values() if split.name != "test"]
    config = models.load_config(model_args)
    if labelled:
        label, names, kind = read_labels(data, labelled)
        if names is None:
            config.num_labels = 1
        else:
            checks.check_model_labels(config, names, first.origin, model_args.ignore_mismatched_sizes)
        config.problem_type = PROBLEM_TYPES[kind]
    else:  # predictions alone: the model knows what it was trained for
        names = checks.model_labels(config)
        kind = next((kind for kind, name in PROBLEM_TYPES.items() if name == config.problem_type), "single")
    classes = names or []  # none where labels are numbers
    tokenizer = models.load_processor(model_args)
    models.fit_vocabulary(model_args, config, tokenizer)
    model = models.load_with_adapter(model_args, HEAD, config)

    def prepare(split: sources.Split) -> Any:
        rows = split.rows
        numbers: list[Any] | None = None
        if split in labelled:
            numbers = checks.label_ids(split, label, names, first.origin) if names else [float(x) for x in rows[label]]
            if kind == "several":
                numbers = [[float(number in row) for number in range(len(classes))] for row in numbers]
        length = min(data.max_seq_length, tokenizer.model_max_length)
        encoded = sources.tokenized(
            split,
            lambda batch: tokenizer(*(batch[column] for column in texts), truncation=True, max_length=length),
            data,
        )
        return encoded if numbers is None else encoded.add_column("labels", numbers)

    ready = {name: prepare(split) for name, split in splits.items()}
    trainer = Trainer(
        model,
        args,
        DataCollatorWithPadding(tokenizer),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        compute_metrics=metric_for(data.task_name, kind),
    )
    return session.run(
        trainer,
        data,
        task="text-classification",
        predict_dataset=ready.get("test"),
        write_predictions=predictions_writer(classes, kind),
        plan_rows=[("texts", ", ".join(texts)), ("labels", ", ".join(names) if names else "a number")],
    )
