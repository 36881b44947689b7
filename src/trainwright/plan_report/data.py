"""What a run reads of its data: columns, lengths of samples, and how much of a batch is padding.

Owns: a look at some samples, and what grouping and packing would gain. Leaves to others: the orders and packs
themselves (`data/`), mistakes in the data (`preflight`).

Lengths are those of `NUM_ROWS` rows, evenly spaced, where a column can be read by itself, else of `NUM_SAMPLES`, which
have to be made. Streams are not read: what they have given is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trainwright.data.from_args import is_iterable
from trainwright.data.length_grouping import get_length_grouped_indices
from trainwright.data.packing import ALONE, plan_packs
from trainwright.data.resumable_sampler import seeded
from trainwright.data.samplers import has_length
from trainwright.interop.loaded import is_hf_dataset, is_hf_iterable_dataset

NUM_ROWS, NUM_SAMPLES = 2000, 256
_MASK = "attention_mask"


def columns_of(dataset: Any, accepted: Collection[str] | None) -> dict[str, list[str]] | None:
    """`kept` and `dropped` columns of `dataset`; None where its samples have no names, or only reading shows them.

    accepted: what may stay; None: everything.
    """
    if is_hf_dataset(dataset) or is_hf_iterable_dataset(dataset):
        names = dataset.column_names
    else:
        sample = None if is_iterable(dataset) or not has_length(dataset) or not len(dataset) else dataset[0]
        names = list(sample) if isinstance(sample, Mapping) else None
    if names is None:
        return None
    kept = [name for name in names if accepted is None or name in accepted]
    return {"kept": kept, "dropped": [name for name in names if name not in kept]}


def lengths_of(dataset: Any, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """(tokens, places) of some samples, each (num_read,): `name` has as many places, some of them masked.

    None where samples have no such sequence of one dimension, or cannot be read in any order.
    """
    if dataset is None or is_iterable(dataset) or not has_length(dataset) or not len(dataset):
        return None
    tokens, places = [], []
    for values, mask in _sequences(dataset, name):
        if not _is_flat(values):
            return None
        places.append(len(values))
        tokens.append(int(np.asarray(mask).sum()) if mask is not None and len(mask) == len(values) else len(values))
    return np.array(tokens, dtype=np.int64), np.array(places, dtype=np.int64)


def _sequences(dataset: Any, name: str) -> Iterator[tuple[Any, Any]]:
    if is_hf_dataset(dataset) and dataset.format["type"] != "custom":
        if name not in dataset.column_names:
            yield None, None
            return
        wanted = [column for column in (name, _MASK) if column in dataset.column_names]
        rows = dataset.select(_spaced(len(dataset), NUM_ROWS)).select_columns(wanted).with_format(None)
        for row in rows:
            yield row[name], row.get(_MASK)
        return
    for number in _spaced(len(dataset), NUM_SAMPLES):
        sample = dataset[number]
        if not isinstance(sample, Mapping) or name not in sample:
            yield None, None
            return
        yield sample[name], sample.get(_MASK)


def _is_flat(values: Any) -> bool:
    if hasattr(values, "ndim"):
        return int(values.ndim) == 1
    return isinstance(values, (list, tuple)) and not (values and hasattr(values[0], "__len__"))


def _spaced(length: int, most: int) -> list[int]:
    return list(range(length)) if length <= most else [number * length // most for number in range(most)]


def padding_of(
    tokens: np.ndarray[Any, Any],
    places: np.ndarray[Any, Any],
    *,
    batch_size: int,
    group_size: int,
    packing_length: int | None,
    strategy: str,
    seed: int,
) -> dict[str, float | None]:
    """The share of a batch that is padding, 0 to 1: `now`, and with `grouped` and `packed` samples (None: cannot be).

    Of samples with as many `tokens` in so many `places`, which batches pad to their widest. batch_size: of a
    micro-batch; group_size: samples that a group is made of; packing_length: of a pack, None where packing cannot be.
    """
    generator, num_samples = seeded(seed), len(tokens)
    in_order: Sequence[int] = range(num_samples)
    grouped = get_length_grouped_indices(torch.from_numpy(places), group_size, generator=generator)
    orders = {"sequential": in_order, "group_by_length": grouped, "batch_rebalance": grouped}
    random = torch.randperm(num_samples, generator=generator).tolist()
    packed = None
    if packing_length is not None and tokens.any():
        plan = plan_packs(tokens[tokens > 0], packing_length, long_samples=ALONE, seed=seed)
        sizes = [int((plan.ends - plan.begins)[a:b].sum()) for a, b in zip(plan.offsets, plan.offsets[1:])]
        packed = 1 - plan.num_tokens / sum(max(packing_length, size) for size in sizes)
    return {
        "now": _padding(tokens, places, orders.get(strategy, random), batch_size),
        "grouped": _padding(tokens, places, grouped, batch_size),
        "packed": packed,
    }


def _padding(
    tokens: np.ndarray[Any, Any], places: np.ndarray[Any, Any], order: Sequence[int], batch_size: int
) -> float:
    ordered = places[np.asarray(order, dtype=np.int64)]
    batches = [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
    total = sum(int(batch.max()) * len(batch) for batch in batches)
    return 1 - int(tokens.sum()) / total if total else 0.0
