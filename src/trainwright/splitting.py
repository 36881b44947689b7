"""One batch as several smaller ones, and their results as one again.

Owns: cutting a batch along its samples, what each part weighs in a mean loss, joining rows. Leaves to others: when to
cut (`oom_retry`), running the parts. A batch that cannot be cut without guessing is refused: a wrong cut would train on
other data than was asked for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from trainwright.micro_batch_weights import items_in
from trainwright.nested import is_mapping, lists_samples, map_items, rebuild, torch_pad_and_concatenate


class CannotSplit(ValueError):
    """A batch whose samples cannot be told apart; the message names the input that stands in the way."""


def num_samples(inputs: Any) -> int:
    """How many samples a batch holds: the length that dimension 0 of all its tensors has.

    Raises CannotSplit where they differ, as in packed sequences, or where the loss compares samples with each other.
    """
    if is_mapping(inputs) and "return_loss" in inputs and inputs["return_loss"]:
        raise CannotSplit("return_loss=True asks for a loss over pairs of samples, which parts of a batch do not have")
    lengths: dict[int, str] = {}
    for name, tensor in _tensors(inputs):
        lengths.setdefault(len(tensor), name)
    if not lengths:
        raise CannotSplit("the batch holds no tensor with a dimension of samples")
    if len(lengths) > 1:
        found = ", ".join(f"{name} has {length}" for length, name in lengths.items())
        raise CannotSplit(f"its inputs differ in their number of rows ({found})")
    return next(iter(lengths))


def split_batch(inputs: Any, parts: int) -> list[Any]:
    """`inputs` as at most `parts` batches of nearly equal size, in order, each of the type that `inputs` has.

    Tensors and arrays are cut along dimension 0 (views, nothing is copied), also inside nested mappings, lists and
    tuples; a list with one entry per sample is cut too; every other value goes into each part. Raises CannotSplit as
    `num_samples` does.
    """
    if parts <= 1:
        return [copy.copy(inputs)]  # an inner copy, as for the parts: a loss may take its labels out of the batch
    rows = num_samples(inputs)
    parts = min(parts, rows)
    smallest, larger = divmod(rows, parts)
    ends = [(index + 1) * smallest + min(index + 1, larger) for index in range(parts)]
    return [_rows_of(inputs, slice(begin, end), rows) for begin, end in zip([0, *ends], ends)]


def first_rows(inputs: Any, number: int) -> Any:
    """The first `number` samples of a batch, cut as `split_batch` does. Raises CannotSplit as `num_samples` does."""
    return _rows_of(inputs, slice(0, number), num_samples(inputs))


def one_row(inputs: Any) -> Any:
    """The first sample of a batch, or the whole where samples cannot be told apart."""
    try:
        return first_rows(inputs, 1)
    except CannotSplit:
        return inputs


def mean_weights(
    parts: Sequence[Any], labels_are_shifted: bool = False, label_names: Sequence[str] = ("labels",)
) -> list[float]:
    """What the mean loss of each part counts in the mean over all of them; the weights add up to 1.

    A mean over class labels counts labels other than -100, every other mean counts samples.
    """
    if len(parts) == 1:
        return [1.0]
    counts = [int(items_in(part, label_names, labels_are_shifted)) for part in parts]
    if not any(counts):
        counts = [num_samples(part) for part in parts]
    return [count / sum(counts) for count in counts]


def join_rows(results: Sequence[Any]) -> Any:
    """The rows of several results as one: tensors along dimension 0, padded on the right with -100 where they differ
    in dimension 1. Lists with an entry per sample follow each other. Numbers and None are taken from the first.
    """
    first = results[0]
    if all(_is_list_of_samples(result) or lists_samples(result, None) for result in results):
        return [entry for result in results for entry in result]
    if isinstance(first, Mapping):
        return type(first)({key: join_rows([result[key] for result in results]) for key in first})  # type: ignore[call-arg]
    if isinstance(first, (list, tuple)):
        return rebuild(first, [join_rows(values) for values in zip(*results)])
    return functools.reduce(torch_pad_and_concatenate, results) if isinstance(first, torch.Tensor) else first


def _has_rows(value: Any) -> bool:
    return len(getattr(value, "shape", ())) > 0


def _tensors(value: Any, name: str = "the batch") -> Iterator[tuple[str, Any]]:
    """Every tensor or array that has rows, and every list of dicts, with the name of the input it belongs to."""
    if _has_rows(value) or _is_list_of_samples(value):
        yield name, value
    elif is_mapping(value):
        for key in value:
            yield from _tensors(value[key], str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, name)


def _is_list_of_samples(value: Any) -> bool:
    """Whether this is a list of a dict for each sample, as labels of images are: it has as many rows as entries."""
    return type(value) is list and bool(value) and is_mapping(value[0])


def _rows_of(value: Any, rows: slice, num_rows: int) -> Any:
    if _has_rows(value) or _is_list_of_samples(value):
        return value[rows]
    if isinstance(value, (list, tuple)):
        holds_tensors = next(_tensors(value), None) is not None
        if holds_tensors and len(value) == num_rows:
            kind = type(value).__name__
            raise CannotSplit(
                f"a {kind} of {num_rows} tensors may be one per sample or one per input, with {num_rows} rows"
            )
        if not holds_tensors:
            return value[rows] if len(value) == num_rows else value
    return map_items(lambda item: _rows_of(item, rows, num_rows), value)
