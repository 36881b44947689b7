"""How long each sample is, found out once.

Owns: `sample_lengths`, remembering what was worked out from a data set. Leaves to others: what lengths are good for
(length_grouping, rebalance, packing).

A table of the `datasets` library knows where each row begins, so its lengths are read without reading a token (ten
million in about a second). Any other data set has to make every sample once: with a bar, by as many processes as load
data, and not again in this process, nor, where the data set has a fingerprint and files, in the next one.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from trainwright.interop.loaded import is_hf_dataset
from trainwright.names import closest
from trainwright.safe_write import check_place, fresh
from trainwright.seeding import RngState

NUM_SAMPLES_WORTH_A_BAR = 100_000  # reading fewer takes seconds; more took users hours in silence
ROWS_AT_ONCE = 10_000
SAMPLES_PER_BATCH = 256  # of a worker

Made = TypeVar("Made")
_REMEMBERED: dict[int, tuple[weakref.ref[Any], dict[Hashable, Any]]] = {}  # by the identity of a data set


def remembered(dataset: Any, key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make()` returned when it was first asked for this object, its length and `key`; cached while it lives.

    An object that cannot be referred to weakly (a list) is asked anew each time.
    """
    number = id(dataset)
    key = (key, len(dataset), getattr(dataset, "_fingerprint", None))
    if number not in _REMEMBERED:
        try:
            reference = weakref.ref(dataset, lambda _: _REMEMBERED.pop(number, None))
        except TypeError:
            return make()
        _REMEMBERED[number] = (reference, {})
    known = _REMEMBERED[number][1]
    if key not in known:
        known[key] = make()
    return known[key]  # type: ignore[no-any-return]


def sample_lengths(
    dataset: Any, *, length_column_name: str | None = None, model_input_name: str | None = None, num_workers: int = 0
) -> torch.Tensor:
    """The length of every sample, int64 `(num_samples,)`.

    Read from the column `length_column_name` of a `datasets.Dataset` without touching other columns; else the length of
    each sample's `model_input_name` (default "input_ids"). Where samples must be made for that, `num_workers` processes
    do it (0: this one), with a progress bar from 100,000 samples on; random states are as before afterwards. Raises
    ValueError where samples have no such field.
    """
    columns = dataset.column_names if is_hf_dataset(dataset) else []
    name = model_input_name or "input_ids"
    if length_column_name in columns:
        column = dataset.select_columns([length_column_name]).with_format("numpy")[:][length_column_name]
        return torch.as_tensor(column, dtype=torch.int64)

    def find() -> torch.Tensor:
        if name in columns:
            return torch.tensor(list(_with_bar(_of_rows(dataset, name), len(dataset))), dtype=torch.int64)
        return _from_disk(dataset, name, partial(_counted, dataset, name, num_workers))

    try:
        return remembered(dataset, ("lengths", name), find)
    except (KeyError, TypeError, IndexError) as error:
        fields = columns or (list(dataset[0]) if isinstance(dataset[0], dict) else [])
        raise ValueError(
            f"The length of each sample is needed, and samples have no {name!r}"
            f"{f' (they have {fields})' if fields else ''}.{closest(name, fields)} Add a column of lengths and name it "
            "in length_column_name, or pass lengths."
        ) from error


def _of_rows(dataset: Any, name: str) -> Iterator[int]:
    """The lengths of a column of a `datasets.Dataset`: of lists by where they begin, of anything else by its values."""
    import pyarrow
    import pyarrow.compute

    rows = dataset.select_columns([name])
    kind = rows.with_format("arrow")[:0].schema.field(name).type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    for batch in rows.with_format("arrow" if is_list else None).iter(batch_size=ROWS_AT_ONCE):
        if is_list:
            lengths = pyarrow.compute.list_value_length(batch.column(name))
            if lengths.null_count:
                raise TypeError(f"{name} is None in {lengths.null_count} samples")
            yield from lengths.to_pylist()
        else:
            yield from map(len, batch[name])


def _counted(dataset: Any, name: str, num_workers: int) -> torch.Tensor:
    """The lengths of samples that have to be made for it."""
    rng = RngState.capture()  # random transforms draw; whether lengths were known must not show in the run
    try:
        if num_workers > 0:
            loader = DataLoader(
                _Indexed(dataset),
                batch_size=SAMPLES_PER_BATCH,
                num_workers=num_workers,
                collate_fn=partial(_lengths_of, name=name),
                generator=torch.Generator(),
            )
            lengths: Iterable[int] = (length for batch in loader for length in batch)
        else:
            # By index, as a sampler reads it: `for sample in dataset` would never end where __getitem__ takes any
            # integer.
            lengths = (len(dataset[index][name]) for index in range(len(dataset)))
        return torch.tensor(list(_with_bar(lengths, len(dataset))), dtype=torch.int64)
    finally:
        rng.restore()


class _Indexed(torch.utils.data.Dataset[Any]):
    """A data set by its indices alone: a loader would take other methods of it into account."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def _lengths_of(samples: list[Any], name: str) -> list[int]:
    return [len(sample[name]) for sample in samples]


def _with_bar(lengths: Iterable[int], total: int) -> Iterable[int]:
    if total < NUM_SAMPLES_WORTH_A_BAR:
        return lengths
    from tqdm.auto import tqdm

    return tqdm(lengths, total=total, desc="Counting lengths", unit="sample")


def _from_disk(dataset: Any, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`make()`, stored next to the files of a data set that has some, under its fingerprint: what it holds and how it
    is transformed. A file that cannot be read or written is as good as none.
    """
    files = getattr(dataset, "cache_files", None) if is_hf_dataset(dataset) else None
    if not files:
        return make()
    folder = os.path.dirname(files[0]["filename"])
    path = os.path.join(folder, f"trainwright-lengths-{dataset._fingerprint}-{name}.npy")
    with contextlib.suppress(OSError, ValueError):
        check_place(path)
        known = np.load(path, allow_pickle=False)
        if known.dtype == np.int64 and known.shape == (len(dataset),):
            return torch.from_numpy(known)
    lengths = make()
    with contextlib.suppress(OSError), fresh(path) as staged, open(staged, "wb") as file:
        np.save(file, lengths.numpy(), allow_pickle=False)
    return lengths
