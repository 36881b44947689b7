"""What is wrong with the columns of a data set, before a batch is made of them.

Owns: labels that are text, missing, or no class of the model. Leaves to others: columns that the model does not take
(`data/columns`), the content of sequences, which only a batch shows (`batch`).

Reads the labels alone: of a `datasets.Dataset` its Arrow column (10 ms for ten million), of a list of dicts the first
100,000. Streams and other data sets show their first batch only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainwright.data.columns import LABEL_COLUMNS
from trainwright.interop.loaded import is_hf_dataset
from trainwright.names import IGNORE_INDEX
from trainwright.preflight.batch import outside
from trainwright.preflight.model_limits import ModelLimits

_MOST_ROWS = 100_000  # of a list that are looked at: about 10 ms
LABELS = ("labels", *LABEL_COLUMNS)
_OTHER_NAMES = frozenset(
    (
        "target",
        "targets",
        "class",
        "classes",
        "class_id",
        "category",
        "score",
        "rating",
        "stars",
        "sentiment",
        "y",
        "answer",
        "gold",
        "tags",
        "ner_tags",
        "pos_tags",
    )
)


def problems(dataset: Any, name: str, limits: ModelLimits) -> Iterator[str]:
    """What a model that gives each sample one class cannot learn from, each with column, row, value and cure.

    name: of the data set, as the user knows it.
    """
    found = _labels_of(dataset)
    if found is None:
        return
    column, values, class_names = found
    where = f"{name}, column {column!r}"
    missing = [row for row, value in enumerate(values) if value is None] if isinstance(values, list) else []
    if missing and len(missing) < len(values):  # all of them: a set without labels
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        yield (
            f"{where}: row {missing[0]} is None{others}. Leave such rows out, dataset.filter(lambda row: "
            f"row[{column!r}] is not None), or give them a label."
        )
        return
    if missing or not limits.computes_usual_loss or limits.num_labels is None or limits.labels_tokens:
        return
    texts = [value for value in values[:_MOST_ROWS] if isinstance(value, str)] if isinstance(values, list) else []
    if texts:
        classes = sorted(set(texts))
        shown = ", ".join(map(repr, classes[:5])) + (" ..." if len(classes) > 5 else "")
        how = (
            f"int(row[{column!r}])"
            if all(text.strip().lstrip("-").isdigit() for text in classes)
            else f"names.index(row[{column!r}])"
        )
        yield (
            f"{where}: row {_row_of(values, texts[0])} is the text {texts[0]!r}, and {limits.class_name} takes whole "
            f"numbers 0..{limits.num_labels - 1}. The data set has {shown}: dataset.class_encode_column({column!r}), "
            f'or dataset.map(lambda row: {{"labels": {how}}}).'
        )
        return
    if limits.num_labels == 1 or limits.problem in ("regression", "multi_label_classification"):
        return
    try:
        numbers = np.asarray(values)
    except ValueError:  # labels of differing lengths
        return
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not len(numbers):
        return
    bad = (numbers != IGNORE_INDEX) & ((numbers < 0) | (numbers >= limits.num_labels))
    if bad.any():
        row = int(bad.argmax())
        counted = numbers[numbers != IGNORE_INDEX]
        place = f"{where}, row {row}"
        yield outside(int(numbers[row]), place, int(counted.min()), int(counted.max()), limits, class_names)


def texts_of(dataset: Any) -> list[str]:
    """Columns of text, as far as a data set's first sample or its features show."""
    if is_hf_dataset(dataset):
        return [name for name, kind in dataset.features.items() if getattr(kind, "dtype", "").endswith("string")]
    return [name for name, value in _first_of(dataset).items() if isinstance(value, str)]


def label_like(dataset: Any) -> list[str]:
    """Columns that are named as labels often are, and not as this package and its models name them."""
    names = dataset.column_names if is_hf_dataset(dataset) else list(_first_of(dataset))
    return [name for name in names if str(name).lower() in _OTHER_NAMES]


def _first_of(dataset: Any) -> Mapping[str, Any]:
    """The first sample of a list of dicts. Of a subclass nothing: its `__getitem__` may be counted, or random."""
    first = dataset[0] if type(dataset) in (list, tuple) and dataset else None
    return first if isinstance(first, Mapping) else {}


def _row_of(values: Any, wanted: Any) -> int:
    return next(row for row, value in enumerate(values) if isinstance(value, str) and value == wanted)


def _labels_of(dataset: Any) -> tuple[str, Any, list[str]] | None:
    """(column, one label per sample, names of the classes) of what can be read cheaply; None: nothing can."""
    if is_hf_dataset(dataset):
        column = next((name for name in LABELS if name in dataset.column_names), None)
        if column is None or dataset.format["type"] == "custom":  # a transform: the stored values are not those used
            return None
        kind = dataset.features[column]
        if type(kind).__name__ not in ("Value", "ClassLabel"):  # sequences
            return None
        table = dataset.select_columns([column]).with_format("arrow")[:]
        values = table.column(column)
        holds_text = kind.dtype.endswith("string") or kind.dtype == "null"
        plain: Any = values.to_pylist() if values.null_count or holds_text else values.to_numpy()
        return column, plain, list(getattr(kind, "names", None) or [])
    if first := _first_of(dataset):
        column = next((name for name in LABELS if name in first), None)
        if column is None or not (first[column] is None or isinstance(first[column], (str, int, float))):
            return None
        return column, [sample.get(column) for sample in dataset[:_MOST_ROWS] if isinstance(sample, Mapping)], []
    return None
