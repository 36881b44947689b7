"""Classification: which columns GLUE's tasks have, the metric of each kind of label, classes of images and sounds.

Owns: the table of tasks, metrics of one label per sample, several, or a number; one class per sample, from its column
to the file of predictions. Leaves to others: reading rows.
Source of columns and metrics: the GLUE benchmark's own definition (gluebenchmark.com/tasks), XNLI's data card.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trainwright.names import closest
from trainwright.tasks import checks
from trainwright.tasks.sources import Split

# Task -> its text columns.
GLUE_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
XNLI_COLUMNS = ("premise", "hypothesis")
HUB_NAMES = {"xnli": "facebook/xnli", **dict.fromkeys(GLUE_COLUMNS, "nyu-mll/glue")}


def task_columns(task: str) -> tuple[str, ...]:
    """The text columns of a task by name; ValueError with the likely name for an unknown one."""
    columns = {**GLUE_COLUMNS, "xnli": XNLI_COLUMNS}
    if task not in columns:
        raise ValueError(f"task_name={task!r} is none of {sorted(columns)}.{closest(task, columns)}")
    return columns[task]


def metric_for(task: str | None, kind: str) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` of a task. `kind`: "single" (one class), "several" (any number of classes), "number".

    CoLA: Matthews correlation; MRPC and QQP: accuracy and F1; numbers: mean squared error, Pearson and Spearman
    correlation; several: micro and macro F1 at a threshold of 0 on the logits, exact-match accuracy; else accuracy.
    """
    if kind == "several" or task in ("cola", "mrpc", "qqp"):  # accuracy alone needs no scikit-learn
        from sklearn import metrics as sk

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        logits = logits[0] if isinstance(logits, tuple) else logits
        if kind == "number":
            return _regression(np.squeeze(logits, -1), labels)
        if kind == "several":
            chosen = (logits > 0).astype(int)
            return {
                "f1_micro": float(sk.f1_score(labels, chosen, average="micro", zero_division=0)),
                "f1_macro": float(sk.f1_score(labels, chosen, average="macro", zero_division=0)),
                "accuracy": float(sk.accuracy_score(labels, chosen)),
            }
        chosen = logits.argmax(-1)
        if task == "cola":
            return {"matthews_correlation": float(sk.matthews_corrcoef(labels, chosen))}
        found = {"accuracy": float((labels == chosen).mean())}
        if task in ("mrpc", "qqp"):
            found["f1"] = float(sk.f1_score(labels, chosen, zero_division=0))
        return found

    return compute


def classes_of(
    splits: dict[str, Split], label_column: str | None, usual: tuple[str, ...], config: Any, ignore_mismatched: bool
) -> tuple[list[str], dict[str, list[int]]]:
    """(names of the classes, split -> class of each of its rows), from the splits that have labels: all but "test".

    Without names in the data they are those of the model's `config`; else they are written to it. Errors as
    `checks.check_model_labels` and `checks.pick_column`.
    """
    labelled = [split for split in splits.values() if split.name != "test"]
    if not labelled:
        return checks.model_labels(config), {}
    origin = next(iter(splits.values())).origin
    label = checks.shared_column(labelled, "label_column", label_column, usual, "the class")
    names = checks.label_names(labelled[0], label) or []
    numbers = {split.name: checks.label_ids(split, label, names, origin) for split in labelled}
    checks.check_model_labels(config, names, origin, ignore_mismatched)
    return names, numbers


def predictions_writer(names: list[str], kind: str = "single") -> Callable[[Any, str], None]:
    """For `session.run`: writes `predictions.tsv` from logits (rows, classes). `kind` as in `metric_for`."""
    from trainwright.tasks import session  # imports torch, which the arguments, that are checked first, do without

    def write(output: Any, directory: str) -> None:
        logits = output.predictions
        if kind == "number":
            words = [f"{value:.4f}" for value in logits[:, 0]]
        elif kind == "several":
            words = ["|".join(name for name, value in zip(names, row) if value > 0) for row in logits]
        else:
            words = [names[number] for number in logits.argmax(-1)]
        lines = [f"{index}\t{word}" for index, word in enumerate(words)]
        session.write_lines(directory, "predictions.tsv", ["index\tprediction", *lines])

    return write


def _regression(values: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    found = {"mse": float(((values - labels) ** 2).mean())}
    if len(labels) > 1 and values.std() > 0 and labels.std() > 0:  # a correlation of constants is not defined
        found["pearson"] = float(pearsonr(values, labels)[0])
        found["spearmanr"] = float(spearmanr(values, labels)[0])
    return found
