"""Training, validation and test data, from local files, folders or the hub, and the origin of each row.

Owns: `Split`, `load_splits`, `tokenized`. Leaves to others: checking the rows (`checks.py`), using them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainwright.names import closest
from trainwright.tasks.arguments import DataArguments
from trainwright.tasks.errors import DataError, package

# Suffix of a file -> builder of `datasets`, and its arguments.
FILE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".txt": ("text", {}),
    ".parquet": ("parquet", {}),
}
Reader = Callable[[str], dict[str, list[Any]]]
SPLITS = {"train": "train_file", "validation": "validation_file", "test": "test_file"}
_HUB_NAMES = {"validation": ("validation", "valid", "val", "dev", "validation_matched"), "test": ("test",)}


@dataclass
class Split:
    """One part of the data. `rows` is a `datasets.Dataset`; `origin` is the file or data set it came from."""

    name: str
    rows: Any
    origin: str
    numbers: list[int] | None = None  # of the rows in `origin`, from 0; None: 0, 1, 2 ...

    def place(self, index: int) -> str:
        """Words for row `index` (from 0), as a person finds it: `train.csv, row 3 (line 4)`."""
        suffix = os.path.splitext(self.origin.removesuffix(" (held out)"))[1].lower()
        index = index if self.numbers is None else self.numbers[index]
        row = f"{self.origin}, row {index + 1}"
        if suffix in (".csv", ".tsv"):
            return f"{row} (line {index + 2}, unless texts hold line breaks)"  # the header is line 1
        return f"{row} (line {index + 1})" if suffix in (".jsonl", ".txt") else row

    def __len__(self) -> int:
        return len(self.rows)

    def with_rows(self, rows: Any) -> Split:
        """The same part with other rows, in the same order."""
        return Split(self.name, rows, self.origin, self.numbers)

    def undecoded(self, column: str) -> Split:
        """The same part with paths or bytes in an image or audio column: we name the row where one cannot be read, and
        `datasets` needs another package for sound.
        """
        feature = self.rows.features[column]
        if type(feature).__name__ in ("Audio", "Image"):
            return self.with_rows(self.rows.cast_column(column, type(feature)(decode=False)))
        return self


def load_splits(
    data: DataArguments,
    *,
    needs: tuple[str, ...] = (),
    folder: tuple[str, tuple[str, ...]] | None = None,
    readers: dict[str, Reader] | None = None,
    shuffled: bool = False,
) -> dict[str, Split]:
    """The parts of the data that are there, by name: "train", "validation", "test".

    `needs`: parts that the run cannot do without. `folder`: for images and sounds, the column and the suffixes of the
    files in a directory that `dataset_name` names, see `_from_folder`; a directory saved by `datasets.save_to_disk` is
    recognised by itself. `readers`: functions from a path to columns, by suffix, for files that `datasets` cannot read.
    Where `validation_split_percentage` is set and there is no validation part, it is cut from the training part: its
    end, or, `shuffled`, random rows (the same in every run), for data that come ordered by their class.
    Raises DataError that names the argument to give.
    """
    datasets = package("datasets")
    files = {name: getattr(data, argument) for name, argument in SPLITS.items() if getattr(data, argument)}
    if files and data.dataset_name:
        raise DataError(f"dataset_name={data.dataset_name!r} and files ({', '.join(files.values())}): keep one.")
    if files:
        splits = {name: _from_file(datasets, name, path, readers or {}) for name, path in files.items()}
    elif data.dataset_name:
        splits = _from_name(datasets, data, folder)
    else:
        raise DataError("There is no data: give --train_file, --validation_file or --test_file, or --dataset_name.")
    if "validation" not in splits and data.validation_split_percentage and "train" in splits:
        _hold_out(splits, data.validation_split_percentage, shuffled)
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(f"{split.origin} ({name}) has no row.")
        limit = limits[name]
        if limit is not None and limit < len(split):
            splits[name] = split.with_rows(split.rows.select(range(limit)))
    for name in needs:
        if name not in splits:
            hint = " or --validation_split_percentage" if name == "validation" else ""
            raise DataError(f"This run needs {name} data: give --{SPLITS[name]}{hint}. There is: {', '.join(splits)}.")
    return splits


def tokenized(
    split: Split, encode: Callable[..., Any], data: DataArguments | None = None, *, with_indices: bool = False
) -> Any:
    """What `encode` makes of the columns of a batch of rows (and, `with_indices`, of their numbers), as a `Dataset`.

    `data` says in how many processes, and whether what an earlier run made is read again.
    """
    return split.rows.map(
        encode,
        with_indices=with_indices,
        batched=True,
        num_proc=data.preprocessing_num_workers if data else None,
        load_from_cache_file=not (data and data.overwrite_cache),
        remove_columns=split.rows.column_names,
        desc=f"Tokenizing {split.name}",
    )


def _from_file(datasets: Any, name: str, path: str, readers: dict[str, Reader]) -> Split:
    if os.path.isdir(path):
        raise DataError(f"{SPLITS[name]}={path!r} is a directory. Give a file, or the directory as --dataset_name.")
    suffix = os.path.splitext(path)[1].lower()
    if suffix in readers:
        return Split(name, datasets.Dataset.from_dict(readers[suffix](path)), path)
    if suffix not in FILE_KINDS:
        known = sorted([*FILE_KINDS, *readers])
        raise DataError(f"{SPLITS[name]}={path!r} is none of {known}.{closest(suffix, known)}")
    kind, options = FILE_KINDS[suffix]
    try:
        rows = datasets.load_dataset(kind, data_files={name: path}, split=name, **options)
    except Exception as error:
        if "corresponds to no data" in str(error):  # how `datasets` says so, of a header alone
            raise DataError(f"{path} ({name}) has no row.") from error
        raise DataError(f"{path} cannot be read as {kind}: {_root(error)}") from error
    return Split(name, rows, path)


def _from_name(datasets: Any, data: DataArguments, folder: tuple[str, tuple[str, ...]] | None) -> dict[str, Split]:
    name = str(data.dataset_name)
    if os.path.isdir(name) and any(os.path.exists(os.path.join(name, one)) for one in _SAVED):
        found = datasets.load_from_disk(name)
    elif os.path.isdir(name) and folder is not None:
        return _from_folder(datasets, name, *folder)
    else:
        found = datasets.load_dataset(name, data.dataset_config_name)
    if not hasattr(found, "column_names") or not isinstance(found.column_names, dict):
        found = {"train": found}
    splits = {"train": Split("train", found["train"], f"{name} (train)")} if "train" in found else {}
    for part, spellings in _HUB_NAMES.items():
        spelling = next((one for one in spellings if one in found), None)
        if spelling is not None:
            splits[part] = Split(part, found[spelling], f"{name} ({spelling})")
    if not splits:
        raise DataError(
            f"dataset_name={name!r} has the parts {list(found)}, but none called train, validation or test."
        )
    return splits


_SAVED = ("dataset_dict.json", "state.json")  # written by `save_to_disk`


def folder_parts(root: str) -> dict[str, str]:
    """Part -> its folder below `root`: those called train, validation (valid, val, dev) and test that are there."""
    spellings = {"train": ("train",), **_HUB_NAMES}
    parts = {
        part: next((path for one in names if os.path.isdir(path := os.path.join(root, one))), None)
        for part, names in spellings.items()
    }
    return {part: path for part, path in parts.items() if path is not None}


def _from_folder(datasets: Any, root: str, column: str, suffixes: tuple[str, ...]) -> dict[str, Split]:
    """Files below `root` in `column`, and the name of each one's folder in "label" where they are in folders.

    Without folders of parts (`folder_parts`) everything is training data.
    """
    splits = {}
    for part, place in (folder_parts(root) or {"train": root}).items():
        files = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(place)
            for name in names
            if name.lower().endswith(suffixes)
        )
        if not files:
            raise DataError(f"{place} holds no file that ends in one of {list(suffixes)}.")
        columns: dict[str, list[str]] = {column: files}
        classes = [os.path.relpath(os.path.dirname(path), place) for path in files]
        if "." not in classes:
            columns["label"] = [name.split(os.sep)[0] for name in classes]
        splits[part] = Split(part, datasets.Dataset.from_dict(columns), place)
    return splits


def _hold_out(splits: dict[str, Split], percentage: int, shuffled: bool) -> None:
    train = splits["train"]
    number = len(train) * percentage // 100
    if number == 0:
        raise DataError(
            f"validation_split_percentage={percentage} of the {len(train)} rows of {train.origin} is no row: give more."
        )
    places = list(range(len(train)))
    if shuffled:
        random.Random(0).shuffle(places)
    held_out, kept = sorted(places[-number:]), sorted(places[:-number])
    name = f"{train.origin} (held out)"
    splits["validation"] = Split("validation", train.rows.select(held_out), name, held_out)
    splits["train"] = Split("train", train.rows.select(kept), train.origin, kept)


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
