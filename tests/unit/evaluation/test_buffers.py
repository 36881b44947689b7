"""Many batches: equal to repeated `nested_concat`, at a linear cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainwright.evaluation.prediction_store import EvalLoopContainer
from trainwright.nested import nested_concat, nested_numpify


class BytesWritten(TorchDispatchMode):
    """Counts the bytes that copying operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("copy", "cat", "clone", "fill")) and isinstance(result, torch.Tensor):
            self.num_bytes += result.nbytes
        return result


def batches_of(num_batches: int, seed: int = 0) -> list[Any]:
    """(logits, {"labels", "hidden": [bfloat16]}) with lengths that differ from batch to batch."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        rows, width = (int(torch.randint(1, high, (), generator=generator)) for high in (5, 20))
        logits = torch.randn(rows, width, 3, generator=generator)
        labels = torch.randint(0, 9, (rows, width), generator=generator)
        batches.append((logits, {"labels": labels, "hidden": [torch.randn(rows, generator=generator).bfloat16()]}))
    return batches


def joined_one_by_one(batches: list[Any]) -> Any:
    joined = batches[0]
    for batch in batches[1:]:
        joined = nested_concat(joined, batch)
    return nested_numpify(joined)


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for left, right in zip(actual, expected):
            assert_same(left, right)
    else:
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("accumulation_steps", [None, 1, 7])
def test_300_batches_of_random_lengths_equal_repeated_concatenation(accumulation_steps: int | None) -> None:
    batches = batches_of(300)
    container = EvalLoopContainer()
    for step, batch in enumerate(batches, start=1):
        container.add(batch)
        if accumulation_steps and step % accumulation_steps == 0:
            container.to_cpu_and_numpy()
    assert_same(container.get_arrays(), joined_one_by_one(batches))


@pytest.mark.parametrize("accumulation_steps", [None, 3])
def test_the_documented_container_of_the_installed_release_gives_the_same(accumulation_steps: int | None) -> None:
    reference = pytest.importorskip("transformers.trainer_pt_utils")
    for do_nested_concat in (True, False):
        mine, theirs = EvalLoopContainer(do_nested_concat, -1), reference.EvalLoopContainer(do_nested_concat, -1)
        for step, batch in enumerate(batches_of(20), start=1):
            for container in (mine, theirs):
                container.add(batch)
                if accumulation_steps and step % accumulation_steps == 0:
                    container.to_cpu_and_numpy()
        assert_same(mine.get_arrays(), theirs.get_arrays())


def test_bytes_copied_are_at_most_three_times_the_result_also_when_moved_every_batch() -> None:
    for num_batches in (50, 400):
        for move in (False, True):
            container = EvalLoopContainer()
            with BytesWritten() as written:
                for width in range(1, num_batches + 1):  # every batch wider than all before it
                    container.add(torch.zeros(2, width))
                    if move:
                        container.to_cpu_and_numpy()
                result = container.get_arrays()
            assert result.shape == (2 * num_batches, num_batches)
            assert result.nbytes // 2 < written.num_bytes <= 3 * result.nbytes


def test_a_slice_does_not_keep_the_logits_it_came_from_alive() -> None:
    container = EvalLoopContainer()
    logits = torch.arange(12.0).reshape(2, 6)
    container.add(logits[:, :2])
    logits.zero_()
    assert container.get_arrays().tolist() == [[0.0, 1.0], [6.0, 7.0]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.int64, torch.float32),
        (torch.float32, torch.int64),
        (torch.float16, torch.float32),
        (torch.bool, torch.int64),
    ],
)
@pytest.mark.parametrize("widths", [(2, 2, 2), (2, 3, 3), (3, 2, 3)])
def test_a_changing_dtype_follows_repeated_concatenation(
    first: torch.dtype, second: torch.dtype, widths: tuple[int, ...]
) -> None:
    batches = [torch.full((2, width), 1.5).to(dtype) for width, dtype in zip(widths, (first, second, second))]
    container = EvalLoopContainer()
    for batch in batches:
        container.add(batch)
    assert_same(container.get_arrays(), joined_one_by_one(batches))


def test_arrays_can_be_read_twice_and_added_to_in_between() -> None:
    container = EvalLoopContainer()
    container.add(torch.tensor([1.0]))
    container.add(torch.tensor([2.0]))
    assert container.get_arrays().tolist() == container.get_arrays().tolist() == [1.0, 2.0]
    container.add(torch.tensor([3.0]))
    assert container.get_arrays().tolist() == [1.0, 2.0, 3.0]


def test_scalars_become_rows_and_an_output_that_is_always_none_stays_none() -> None:
    container = EvalLoopContainer()
    for value in (3, 4):
        container.add((torch.tensor(value), None))
    array, nothing = container.get_arrays()
    assert array.tolist() == [3, 4] and nothing is None


def test_nothing_added_gives_none() -> None:
    for do_nested_concat in (True, False):
        container = EvalLoopContainer(do_nested_concat)
        container.add(None)
        container.to_cpu_and_numpy()
        assert container.get_arrays() is None


def test_arrays_join_like_tensors() -> None:
    container = EvalLoopContainer()
    container.add(np.array([[1]]))
    container.add(np.array([[2, 3]]))
    assert container.get_arrays().tolist() == [[1, -100], [2, 3]]


@pytest.mark.parametrize(
    ("first", "second", "error", "words"),
    [
        (torch.ones(1, 2, 3), torch.ones(1, 2, 4), ValueError, "cannot join"),
        (torch.ones(1), torch.ones(1, 1), ValueError, "cannot join"),
        (torch.ones(1), np.ones(1), TypeError, "a later one"),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, KeyError, "lacks the outputs"),
        ((torch.ones(1),), [torch.ones(1)], TypeError, "differ in structure"),
        (torch.ones(1), None, ValueError, "gave None"),
        ("text", None, TypeError, "ignore_keys"),
    ],
)
def test_batches_that_do_not_belong_together_are_named(first: Any, second: Any, error: type, words: str) -> None:
    container = EvalLoopContainer()
    with pytest.raises(error, match=words):
        container.add(first)
        container.add(second)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("one_transfer_bytes", [0, 2**26])
def test_batches_on_a_device_give_the_same_arrays(one_transfer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainwright.evaluation.buffers.ONE_TRANSFER_BYTES", one_transfer_bytes)
    batches = batches_of(40)
    container = EvalLoopContainer()
    for step, (logits, rest) in enumerate(batches):
        container.add((logits.cuda(), {"labels": rest["labels"].cuda(), "hidden": [rest["hidden"][0].cuda()]}))
        if step % 9 == 8:
            container.to_cpu_and_numpy()
    assert_same(container.get_arrays(), joined_one_by_one(batches))
