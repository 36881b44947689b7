"""Batches of an evaluation, made a few at a time where the loop makes them itself.

Owns: `in_groups`: whether batches may be made before they are asked for, and how many. Leaves to others: batches of
workers, which are made ahead anyway (`worker_transport`).

Why: a model's weights pass through the processor's caches, so whatever runs between two forward passes is fetched from
memory again each time. A collator that makes 16 batches in a row is fetched once. That saves a third of the time that a
loop spends outside of a small model (`benchmarks/evaluation.py`). Not for training, where samples and dropout masks
draw random numbers in turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from trainwright.data.loaders import RunLoader
from trainwright.data.worker_transport import iterate_ahead

MOST_BATCHES = 16
MOST_BYTES = 2**20  # of a group; its last batch may go beyond
MOST_WAIT_S = 0.01  # for a group: where batches take longer, nothing is gained, and the loop should continue


def in_groups(dataloader: Any) -> Iterator[Any]:
    """The batches of `dataloader` in its order, made in groups where nothing but time shows it: it is torch's own, has
    no workers and a data set with indices, and its batches are small dicts of tensors that share no memory.

    An error of the data set comes after the batches before it.
    """
    batches = iterate_ahead(dataloader)
    is_ours = type(dataloader) in (DataLoader, RunLoader)
    if not is_ours or dataloader.num_workers or isinstance(dataloader.dataset, IterableDataset):
        return batches
    return _grouped(batches)


def _grouped(batches: Iterator[Any]) -> Iterator[Any]:
    first = []  # all referenced, so that the same memory was used twice
    for batch in batches:
        first.append(batch)
        yield batch
        if len(first) == MOST_BATCHES:
            break
    if not _share_no_memory(first):
        first.clear()
        yield from batches
        return
    first.clear()
    while True:
        group, error = _next_group(batches)
        yield from group
        if error is not None:
            raise error
        if not group:
            return


def _next_group(batches: Iterator[Any]) -> tuple[list[Any], Exception | None]:
    """Some batches, none at the end; and the error that came after them."""
    group: list[Any] = []
    num_bytes, end = 0, time.perf_counter() + MOST_WAIT_S
    try:
        for batch in batches:
            group.append(batch)
            num_bytes += _num_bytes(batch)
            if len(group) == MOST_BATCHES or num_bytes >= MOST_BYTES or time.perf_counter() > end:
                break
    except Exception as error:
        return group, error
    return group, None


def _share_no_memory(batches: list[Any]) -> bool:
    """Whether a loader that made `batches`, which are all still there, makes each anew: one that fills the same tensors
    again would overwrite a batch that was not seen yet. False also where they are too few or too large to tell.
    """
    if len(batches) < MOST_BATCHES or sum(map(_num_bytes, batches)) > MOST_BYTES:
        return False
    tensors = [tensor for batch in batches for tensor in batch.values()]
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def _num_bytes(batch: Any) -> int:
    """Bytes of a dict of tensors; of anything else too many for a group."""
    if type(batch) is not dict:
        return MOST_BYTES + 1
    num_bytes = 0
    for value in batch.values():  # a comprehension is a call more
        num_bytes += value.nbytes if type(value) is torch.Tensor else MOST_BYTES + 1
    return num_bytes
