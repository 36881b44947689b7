"""Nested functions against the installed release on random nestings."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from trainwright import nested as ours

reference = pytest.importorskip("transformers.trainer_pt_utils")
reference_utils = pytest.importorskip("transformers.trainer_utils")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64]  # bool is padded by choice otherwise (parity.md)


def random_leaf(rng: random.Random, rows: int, width: int, ndim: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (rows, width, 3)[:ndim] if ndim else ()
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(rng.randrange(10**6))).to(dtype)


def random_nesting(seed: int, rows: int, width: int, depth: int = 2) -> Any:
    """The structure, ranks and dtypes depend on `seed` alone, so two calls give batches that belong together."""
    rng = random.Random(seed)

    def build(level: int) -> Any:
        kind = rng.choice(["leaf", "tuple", "list", "dict", "ordered", "user"]) if level else "leaf"
        if kind == "leaf":
            return random_leaf(rng, rows, width, rng.choice([1, 2, 3]), rng.choice(DTYPES))
        children = [build(level - 1) for _ in range(rng.randint(1, 3))]
        named = {f"key{i}": child for i, child in enumerate(children)}
        kinds = {"tuple": tuple(children), "list": children, "dict": named, "ordered": OrderedDict(named)}
        return kinds.get(kind) or UserDict(named)

    return build(depth)


def assert_identical(actual: Any, expected: Any) -> None:
    """Same structure, types, dtypes, shapes and bits."""
    assert type(actual) is type(expected)
    if isinstance(expected, (dict, UserDict)):
        assert list(actual) == list(expected)
        for key in expected:
            assert_identical(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for left, right in zip(actual, expected):
            assert_identical(left, right)
    elif isinstance(expected, (torch.Tensor, np.ndarray)):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert bool((actual == expected).all())
    else:
        assert actual == expected


@pytest.mark.parametrize("seed", range(30))
def test_nested_functions_agree_with_the_installed_release(seed: int) -> None:
    first, second = random_nesting(seed, 3, 4), random_nesting(seed, 2, 6)
    joined = ours.nested_concat(first, second, padding_index=-7)
    assert_identical(joined, reference.nested_concat(copy.deepcopy(first), second, padding_index=-7))
    assert_identical(ours.nested_numpify(joined), reference.nested_numpify(joined))
    assert_identical(ours.nested_detach(joined), reference.nested_detach(joined))
    assert_identical(ours.nested_truncate(joined, 4), reference.nested_truncate(joined, 4))
    assert ours.find_batch_size(joined) == reference.find_batch_size(joined) == 5


@pytest.mark.parametrize("seed", range(20))
def test_arrays_concatenate_like_the_installed_release(seed: int) -> None:
    rng = random.Random(seed)
    ndim, dtypes = rng.choice([0, 1, 2, 3]), rng.choices([torch.float32, torch.int64, torch.float16], k=2)
    leaves = [random_leaf(rng, rng.randint(1, 4), rng.randint(1, 4), ndim, dtype) for dtype in dtypes]
    assert_identical(
        ours.torch_pad_and_concatenate(*leaves, padding_index=5),
        reference.torch_pad_and_concatenate(*leaves, padding_index=5),
    )
    arrays = [leaf.numpy() for leaf in leaves]
    assert_identical(ours.numpy_pad_and_concatenate(*arrays), reference.numpy_pad_and_concatenate(*arrays))


def test_new_like_expand_like_and_atleast_1d_agree_with_the_installed_release() -> None:
    nested = (np.arange(6).reshape(2, 3), [np.ones((2, 3, 2), np.float16), np.array([1, 0])])
    assert_identical(ours.nested_new_like(nested, 4), reference.nested_new_like(nested, 4))
    assert_identical(ours.expand_like(nested[0], 5), reference.expand_like(nested[0], 5))
    for scalar in (torch.tensor(2.0), np.array(2), 3.0, [1, 2]):
        assert_identical(ours.atleast_1d(scalar), reference.atleast_1d(scalar))


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        [],
        {"a": []},
        torch.tensor(1.0),
        [torch.tensor(1.0), torch.ones(2)],
        (1, np.ones(3)),
        {"a": None, "b": torch.ones(4)},
    ],
)
def test_batch_size_is_found_where_the_installed_release_finds_it(value: Any) -> None:
    assert ours.find_batch_size(value) == reference.find_batch_size(value)


def test_metrics_become_plain_numbers_like_in_the_installed_release() -> None:
    metrics = {
        "a": np.float32(1.5),
        "b": torch.tensor(2),
        "c": [np.int64(1), (torch.tensor([1]),)],
        "d": np.ones(1),
        "e": "x",
    }
    assert_identical(ours.denumpify_detensorize(metrics), reference_utils.denumpify_detensorize(metrics))


def test_named_tuples_keep_their_fields() -> None:
    Output = namedtuple("Output", ["start", "end"])
    joined = ours.nested_concat(Output(torch.ones(1), torch.zeros(1)), Output(torch.ones(2), torch.zeros(2)))
    assert isinstance(joined, Output) and joined.end.tolist() == [0.0] * 3


def test_bfloat16_with_a_graph_becomes_a_float32_array() -> None:
    array = ours.nested_numpify([torch.ones(2, dtype=torch.bfloat16, requires_grad=True)])[0]
    assert array.dtype == np.float32 and array.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("first", "second"), [(torch.ones(1), np.ones(1)), ([torch.ones(1)], (torch.ones(1),)), ("a", "b")]
)
def test_what_cannot_be_joined_is_a_type_error(first: Any, second: Any) -> None:
    with pytest.raises(TypeError, match="cannot"):
        ours.nested_concat(first, second)


class Keyed:
    """A batch that inherits from no mapping, and whose iteration gives rows."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def keys(self) -> Any:
        return self.values.keys()

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __iter__(self) -> Any:
        return iter(torch.arange(2))


Pair = namedtuple("Pair", "keys values")


def test_items_are_replaced_one_level_deep_in_anything_with_keys_and_in_order():
    for kind in (dict, OrderedDict, UserDict, Keyed):
        batch = kind({"b": [1], "a": 2})
        found = ours.map_items(lambda item: item * 2, batch)
        assert type(found) is kind and [(key, found[key]) for key in found.keys()] == [("b", [1, 1]), ("a", 4)]  # noqa: SIM118
        assert list(ours.items(batch)) == [[1], 2]


def test_a_named_tuple_with_a_field_called_keys_is_a_tuple():
    found = ours.map(lambda leaf: leaf + 1, Pair(1, [2, (3,)]))
    assert found == Pair(2, [3, (4,)]) and type(found) is Pair
    assert list(ours.items(found)) == [2, [3, (4,)]]


def test_a_leaf_has_no_items():
    leaf = torch.ones(2)
    assert ours.map_items(str, leaf) is leaf and list(ours.items(leaf)) == []
