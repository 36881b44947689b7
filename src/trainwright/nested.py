"""Nested values: a tensor or array, or mappings, lists and tuples of them, as collators and models return them.

Owns: walking a nesting, and what each function does to one leaf. Leaves to others: many batches in linear time
(`evaluation/buffers`) and other processes (`evaluation/distributed`). Names and signatures: `trainer_pt_utils` of both
generations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from trainwright.names import IGNORE_INDEX

Nested = Any  # torch.Tensor | np.ndarray | tuple[Nested, ...] | list[Nested] | Mapping[str, Nested]


def map(function: Callable[[Any], Any], data: Nested) -> Nested:
    """Apply `function` to every leaf; tuples, named tuples, lists and mappings come back as the type they were."""
    if isinstance(data, (list, tuple, Mapping)):
        return map_items(functools.partial(map, function), data)
    return function(data)


def map_items(function: Callable[[Any], Any], data: Nested) -> Nested:
    """Apply `function` to each item of a list, tuple or mapping, one level deep; anything else comes back as it is.

    What has `keys` counts as a mapping, since a batch may be of a type that inherits from none.
    """
    if isinstance(data, (list, tuple)):
        return rebuild(data, [function(item) for item in data])
    if is_mapping(data):
        return type(data)({key: function(data[key]) for key in data.keys()})  # noqa: SIM118 (it may iterate over rows)
    return data


def items(data: Nested) -> Iterable[Any]:
    """What `map_items` applies its function to, in the same order; nothing of a leaf."""
    if isinstance(data, (list, tuple)):
        return data
    return [data[key] for key in data.keys()] if is_mapping(data) else ()  # noqa: SIM118


def is_mapping(data: Any) -> bool:
    """Whether `data` holds items under keys."""
    return isinstance(data, (dict, Mapping)) or hasattr(data, "keys")  # dict first: an abstract class costs calls


def rebuild(like: Nested, values: list[Any]) -> Nested:
    """`values` as a sequence of the type of `like`; a named tuple takes its fields one by one."""
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


def strided_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The ordinary tensors that hold what `tensor` does: itself, or indices and values of a sparse one, values last."""
    if tensor.is_nested:
        return [tensor.values() if tensor.layout is torch.jagged else tensor.clone().values()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def atleast_1d(tensor_or_array: Any) -> Any:
    """Turn a scalar into one row; a tensor stays a tensor, everything else becomes an array."""
    if isinstance(tensor_or_array, torch.Tensor):
        return torch.atleast_1d(tensor_or_array)  # type: ignore[no-untyped-call]
    return np.atleast_1d(tensor_or_array)


def with_room_for(dtype: Any, fill: int) -> Any:
    """The dtype, of torch or NumPy, of rows that are padded with `fill`: `dtype`, or for integers and bool that cannot
    hold it the smallest signed one that holds it and all their values: a mask padded with -100 becomes int8, uint8
    becomes int16.

    Raises ValueError for uint64, whose values no signed type holds.
    """
    is_torch = isinstance(dtype, torch.dtype)
    if is_torch and (dtype.is_floating_point or dtype.is_complex):
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name == "bool":
        least, most = 0, 1
    elif is_torch or dtype.kind in "iu":
        values: Any = torch.iinfo(dtype) if is_torch else np.iinfo(dtype)
        least, most = int(values.min), int(values.max)
        if least <= fill <= most:
            return dtype
    else:
        return dtype
    for size in (8, 16, 32, 64):
        limit = 2 ** (size - 1)
        if -limit <= min(least, fill) and max(most, fill) < limit:
            return getattr(torch, f"int{size}") if is_torch else np.dtype(f"int{size}")
    raise ValueError(
        f"Rows of {name} differ in width, and no integer type holds all of its values and the padding {fill}. Convert "
        "them in preprocess_logits_for_metrics or in the collator, or keep batches apart with "
        "eval_do_concat_batches=False."
    )


def padding_for(dtype: Any, padding_index: int, token_padding: int | None) -> int:
    """`token_padding`, where it is given, for the types that tokens have, to be decoded. Else `padding_index`: smaller
    types are masks and bytes, also where `with_room_for` made them of bool.
    """
    is_token = str(dtype).removeprefix("torch.") in ("int32", "int64")
    return token_padding if is_token and token_padding is not None else padding_index


def fill_for(dtype: Any, padding_index: int) -> Any:
    """What pads rows of `dtype`, which has room for it: `padding_index`, an empty text, not-a-time."""
    kind = getattr(dtype, "kind", "f")
    return {"U": "", "S": b"", "M": "NaT", "m": "NaT"}.get(kind, padding_index)


def torch_pad_and_concatenate(
    tensor1: torch.Tensor, tensor2: torch.Tensor, padding_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Concatenate along dimension 0; where dimension 1 differs, the shorter is padded on the right.

    A padded result has the dtype of `tensor1`, or one that has room for the padding (`with_room_for`); a plain
    concatenation promotes.
    """
    tensor1, tensor2 = atleast_1d(tensor1), atleast_1d(tensor2)
    if tensor1.ndim == 1 or tensor1.shape[1] == tensor2.shape[1]:
        return torch.cat((tensor1, tensor2), dim=0)
    rows, width = len(tensor1), max(tensor1.shape[1], tensor2.shape[1])
    dtype = with_room_for(tensor1.dtype, padding_index)
    joined = tensor1.new_full((rows + len(tensor2), width, *tensor1.shape[2:]), padding_index, dtype=dtype)
    joined[:rows, : tensor1.shape[1]] = tensor1
    joined[rows:, : tensor2.shape[1]] = tensor2
    return joined


def numpy_pad_and_concatenate(array1: Any, array2: Any, padding_index: int = IGNORE_INDEX) -> np.ndarray[Any, Any]:
    """`torch_pad_and_concatenate` for arrays."""
    array1, array2 = atleast_1d(array1), atleast_1d(array2)
    if array1.ndim == 1 or array1.shape[1] == array2.shape[1]:
        return np.concatenate((array1, array2), axis=0)
    rows, width = len(array1), max(array1.shape[1], array2.shape[1])
    dtype = with_room_for(
        np.promote_types(array1.dtype, array2.dtype) if _is_text(array1) else array1.dtype, padding_index
    )
    fill = fill_for(dtype, padding_index)
    joined = np.full_like(array1, fill, dtype=dtype, shape=(rows + len(array2), width, *array1.shape[2:]))
    joined[:rows, : array1.shape[1]] = array1
    joined[rows:, : array2.shape[1]] = array2
    return joined


def _is_text(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype.kind in "US"


def nested_concat(tensors: Nested, new_tensors: Nested, padding_index: int = IGNORE_INDEX) -> Nested:
    """Append the rows of `new_tensors` to `tensors`, leaf by leaf, padding dimension 1 on the right.

    Copies everything gathered so far; for many batches use `prediction_store.EvalLoopContainer`. A sequence keeps the
    length of the shorter, a mapping the keys of the first. Raises TypeError where the two differ in type or a leaf is
    no array.
    """
    both_tensors = isinstance(tensors, torch.Tensor) and isinstance(
        new_tensors, torch.Tensor
    )  # e.g. Parameter and Tensor
    if type(tensors) is not type(new_tensors) and not both_tensors:
        raise TypeError(
            f"cannot append a {type(new_tensors).__name__} to a {type(tensors).__name__}: types must agree."
        )
    if isinstance(tensors, Mapping):
        joined = {key: nested_concat(value, new_tensors[key], padding_index) for key, value in tensors.items()}
        return type(tensors)(joined)  # type: ignore[call-arg]
    if isinstance(tensors, (list, tuple)):
        return rebuild(tensors, [nested_concat(a, b, padding_index) for a, b in zip(tensors, new_tensors)])
    if isinstance(tensors, torch.Tensor):
        return torch_pad_and_concatenate(tensors, new_tensors, padding_index)
    if isinstance(tensors, np.ndarray):
        return numpy_pad_and_concatenate(tensors, new_tensors, padding_index)
    raise TypeError(f"cannot concatenate {type(tensors).__name__}; allowed are tensors, arrays and nestings of them.")


def find_batch_size(tensors: Nested) -> int | None:
    """The number of rows of the first leaf that has rows; None where there is none."""
    if isinstance(tensors, Mapping):
        tensors = list(tensors.values())
    if isinstance(tensors, (list, tuple)):
        return next((size for one in tensors if (size := find_batch_size(one)) is not None), None)
    if isinstance(tensors, (torch.Tensor, np.ndarray)) and tensors.ndim > 0:
        return len(tensors)
    return None


def numpify(tensor: Any) -> Any:
    """One tensor as an array. NumPy has no bfloat16 and no float8, so these become float32, which holds their values
    exactly.
    """
    if not isinstance(tensor, torch.Tensor):
        return tensor
    tensor = tensor.detach().cpu()
    has_none = tensor.dtype == torch.bfloat16 or (tensor.is_floating_point() and tensor.itemsize == 1)
    return (tensor.float() if has_none else tensor).numpy()


def nested_numpify(tensors: Nested) -> Nested:
    """Every tensor as an array on the host (a device synchronisation each); other leaves stay as they are."""
    return map(numpify, tensors)


def nested_detach(tensors: Nested) -> Nested:
    """Every tensor without its graph, so that its activations can be freed."""
    return map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, tensors)


def nested_truncate(tensors: Nested, limit: int) -> Nested:
    """The first `limit` rows of every leaf (a view)."""
    return map(lambda leaf: leaf[:limit], tensors)


def first_samples(tensors: Nested, limit: int, num_rows: int) -> Nested:
    """The first `limit` of the `num_rows` samples in `tensors`, whose lists may have an entry for each of them."""
    if type(tensors) is list and (lists_samples(tensors, num_rows) or num_samples_in(tensors) == len(tensors)):
        return tensors[:limit]
    if isinstance(tensors, (list, tuple, Mapping)):
        return map_items(lambda value: first_samples(value, limit, num_rows), tensors)
    return tensors[:limit]


def num_samples_in(tensors: Nested) -> int | None:
    """`find_batch_size`, for which a list of dicts has an entry for each sample, as detectors return it."""
    if type(tensors) is list and tensors and isinstance(tensors[0], Mapping):
        return len(tensors)
    if isinstance(tensors, Mapping):
        tensors = list(tensors.values())
    if isinstance(tensors, (list, tuple)):
        return next((size for one in tensors if (size := num_samples_in(one)) is not None), None)
    return find_batch_size(tensors)


def nested_new_like(arrays: Nested, num_samples: int, padding_index: int = IGNORE_INDEX) -> Nested:
    """Arrays of `num_samples` rows filled with `padding_index`, otherwise of the shape and dtype of `arrays` (or one
    that has room for the padding).
    """

    def new_like(array: Any) -> np.ndarray[Any, Any]:
        empty: np.ndarray[Any, Any] = np.empty(0, dtype=numpify(array[:0] if array.ndim else array).dtype)
        dtype = with_room_for(empty.dtype, padding_index)
        fill = fill_for(dtype, padding_index)
        return np.full_like(empty, fill, dtype=dtype, shape=(num_samples, *array.shape[1:]))

    return map(new_like, arrays)


def expand_like(
    arrays: np.ndarray[Any, Any], new_seq_length: int, padding_index: int = IGNORE_INDEX
) -> np.ndarray[Any, Any]:
    """`arrays` with dimension 1 widened to `new_seq_length`, padded on the right."""
    dtype = with_room_for(arrays.dtype, padding_index)
    fill, shape = fill_for(dtype, padding_index), (len(arrays), new_seq_length, *arrays.shape[2:])
    widened = np.full_like(arrays, fill, dtype=dtype, shape=shape)
    widened[:, : arrays.shape[1]] = arrays
    return widened


def lists_samples(values: Nested, num_rows: int | None) -> bool | None:
    """Whether the list `values` of a batch of `num_rows` samples has an entry for each of them, as the boxes of images
    do, and not for each of several outputs. None: nothing tells. num_rows=None: not known.

    Outputs are tensors that have a row for each sample; what has other rows, or none, can only be of one sample.
    """
    if type(values) is not list or not values or (num_rows is not None and len(values) != num_rows):
        return False
    sizes: list[Any] = []
    map(lambda leaf: sizes.append(len(leaf) if getattr(leaf, "ndim", 0) else None), values)
    if num_rows is None:
        num_rows = sizes[0] if sizes else None
    return None if sizes and all(size == num_rows is not None for size in sizes) else True


def denumpify_detensorize(metrics: Nested) -> Nested:
    """NumPy scalars and one-element tensors as Python numbers, so that JSON can hold them."""

    def plain(leaf: Any) -> Any:
        is_scalar = isinstance(leaf, np.generic) or (isinstance(leaf, torch.Tensor) and leaf.numel() == 1)
        return leaf.item() if is_scalar else leaf

    return map(plain, metrics)
