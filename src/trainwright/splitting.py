"""Split a batch into smaller ones along its samples, and concatenate their outputs.

Owns: splitting, the weight of each part in a mean loss, concatenation. Leaves to others: when to split (`oom_retry`),
running the parts. A batch whose batch dimension is ambiguous is refused: a wrong split would train on other data.
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
    """The batch dimension of a batch is ambiguous; the message names the input."""


def num_samples(inputs: Any) -> int:
    """The batch size: the length of dimension 0, which all tensors of a batch share.

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

    Tensors and arrays are split along dimension 0 (into views), also inside nested mappings, lists and tuples; so is a
    list with one entry per sample; every other value is in each part. Raises CannotSplit as `num_samples` does.
    """
    if parts <= 1:
        return [copy.copy(inputs)]  # shallow: a loss may pop the labels out of the batch
    rows = num_samples(inputs)
    parts = min(parts, rows)
    smallest, larger = divmod(rows, parts)
    ends = [(index + 1) * smallest + min(index + 1, larger) for index in range(parts)]
    return [_rows_of(inputs, slice(begin, end), rows) for begin, end in zip([0, *ends], ends)]


def first_rows(inputs: Any, number: int) -> Any:
    """The first `number` samples of a batch, as `split_batch` splits it. Raises CannotSplit as `num_samples` does."""
    return _rows_of(inputs, slice(0, number), num_samples(inputs))


def one_row(inputs: Any) -> Any:
    """The first sample of a batch, or the whole batch where it cannot be split."""
    try:
        return first_rows(inputs, 1)
    except CannotSplit:
        return inputs


def mean_weights(
    parts: Sequence[Any], labels_are_shifted: bool = False, label_names: Sequence[str] = ("labels",)
) -> list[float]:
    """The weight of each part's mean loss in the mean over the whole batch; they sum to 1.

    Parts weigh as many labels as they have (-100 is none), or samples where the labels are no classes.
    """
    if len(parts) == 1:
        return [1.0]
    counts = [int(items_in(part, label_names, labels_are_shifted)) for part in parts]
    if not any(counts):
        counts = [num_samples(part) for part in parts]
    return [count / sum(counts) for count in counts]


def join_rows(results: Sequence[Any]) -> Any:
    """Concatenate outputs of several parts: tensors along dimension 0, padded on the right with -100 where they differ
    in dimension 1; lists with an entry per sample; of numbers and None, the first part's.
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
    """Every tensor or array with a batch dimension, and every list of dicts, with the name of its input."""
    if _has_rows(value) or _is_list_of_samples(value):
        yield name, value
    elif is_mapping(value):
        for key in value:
            yield from _tensors(value[key], str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, name)


def _is_list_of_samples(value: Any) -> bool:
    """Whether this is a list of one dict per sample, as labels of object detection are."""
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
