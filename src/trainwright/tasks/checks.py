"""Checks of the data of a task. Each error names the file, the row, what was found, and a remedy.

Owns: columns, labels, empty rows. Leaves to others: reading rows (`sources.py`), acting on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from trainwright.names import closest
from trainwright.tasks.errors import DataError
from trainwright.tasks.sources import Split

MAX_LABELS_SHOWN = 12


def pick_column(split: Split, argument: str, given: str | None, usual: Sequence[str], purpose: str) -> str:
    """The column that holds `purpose`: `given` (the value of the argument), else the first of the `usual` names there.

    Raises DataError naming the columns there are and the argument to give.
    """
    names = list(split.rows.column_names)
    if given is not None:
        if given not in names:
            raise DataError(
                f"{split.origin} has no column {given!r} ({argument}, {purpose}); it has {names}."
                f"{closest(given, names)}"
            )
        return given
    for name in usual:
        if name in names:
            return name
    raise DataError(
        f"{split.origin} has no column for {purpose}: it has {names}, and none is called "
        f"{' or '.join(map(repr, usual))}. Name it with --{argument}."
    )


def require_columns(splits: Iterable[Split], columns: Sequence[str]) -> None:
    """Raise DataError where a part lacks one of `columns`, which another part has."""
    for split in splits:
        for column in columns:
            if column not in split.rows.column_names:
                names = list(split.rows.column_names)
                raise DataError(f"{split.origin} has no column {column!r}; it has {names}.{closest(column, names)}")


def shared_column(splits: Iterable[Split], argument: str, given: str | None, usual: Sequence[str], purpose: str) -> str:
    """The column of the first of `splits` as `pick_column` finds it. DataError also where another one lacks it."""
    splits = list(splits)
    column = pick_column(splits[0], argument, given, usual, purpose)
    require_columns(splits, [column])
    return column


def check_filled(split: Split, column: str, cure: str = "Remove the row, or fill it.") -> None:
    """Raise DataError at the first row whose `column` is None (an empty cell)."""
    for index, value in enumerate(split.rows[column]):
        if value is None:
            raise DataError(f"{split.place(index)}: column {column!r} is empty. {cure}")


def label_names(split: Split, column: str) -> list[str] | None:
    """The names of the classes in `column`, in the order of their numbers; None where labels are real numbers.

    A `ClassLabel` column knows them; whole numbers 0, 1, 2 ... and texts are sorted. Lists of labels are looked into.
    """
    feature = split.rows.features[column]
    inner = getattr(feature, "feature", feature)
    if hasattr(inner, "names"):
        return list(inner.names)
    found: set[Any] = set()
    for value in split.rows[column]:
        found.update(value if isinstance(value, (list, tuple)) else [value])
    found.discard(None)
    if any(isinstance(value, float) and not value.is_integer() for value in found):
        return None
    if found and all(isinstance(value, (int, float)) for value in found):
        numbers = sorted(int(value) for value in found)
        if numbers[0] < 0:
            raise DataError(f"{split.origin}: column {column!r} holds the label {numbers[0]}; labels begin at 0.")
        return [str(number) for number in range(numbers[-1] + 1)]
    return sorted(map(str, found))


def label_ids(split: Split, column: str, names: Sequence[str], known_from: str) -> list[Any]:
    """The number of each row's label (or labels) among `names`. Raises DataError at the first that is not there.

    `known_from`: where the names come from, for the message, such as "train.csv" or "the model in out".
    """
    numbers = {name: number for number, name in enumerate(names)}
    inner = getattr(split.rows.features[column], "feature", split.rows.features[column])
    own_names = list(inner.names) if hasattr(inner, "names") else None

    def number_of(value: Any, index: int) -> int:
        text = own_names[value] if own_names is not None and isinstance(value, int) and value >= 0 else value
        text = str(int(text)) if isinstance(text, float) and text.is_integer() else str(text)
        if text not in numbers:
            shown = list(names[:MAX_LABELS_SHOWN]) + (["..."] if len(names) > MAX_LABELS_SHOWN else [])
            raise DataError(
                f"{split.place(index)}: the label {text!r} (column {column!r}) is none of the {len(names)} labels of "
                f"{known_from}: {shown}.{closest(text, names)} Correct the row, or train with data that has it."
            )
        return numbers[text]

    return [
        [number_of(one, index) for one in value] if isinstance(value, (list, tuple)) else number_of(value, index)
        for index, value in enumerate(split.rows[column])
    ]


def model_labels(config: Any) -> list[str]:
    """The names of the classes of a model, in the order of their numbers."""
    return [config.id2label[number] for number in sorted(config.id2label)]


def check_model_labels(config: Any, names: Sequence[str], origin: str, ignore_mismatched_sizes: bool) -> None:
    """Compare the labels of the data with those a model was trained for; raise DataError where they do not match.

    A configuration with default names ("LABEL_0" ...) was trained for none. Sets both mappings in `config`.
    """
    known = model_labels(config) if getattr(config, "id2label", None) else []
    is_default = all(name == f"LABEL_{number}" for number, name in enumerate(known))
    if known and not is_default and known != list(names):
        if sorted(known) != sorted(names) and not ignore_mismatched_sizes:
            raise DataError(
                f"The model was trained for the labels {known[:MAX_LABELS_SHOWN]}, but {origin} has "
                f"{list(names)[:MAX_LABELS_SHOWN]}. Use --ignore_mismatched_sizes to train a new head, or other data."
            )
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
