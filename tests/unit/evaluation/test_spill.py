"""Rows beyond the memory budget: the same arrays, as maps of files, and no more in main memory than allowed."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainwright.evaluation import spill
from trainwright.evaluation.prediction_store import EvalLoopContainer
from trainwright.evaluation.spill import GIB, MemoryBudget


def ragged(num_batches: int = 40) -> list[Any]:
    """(logits, {"labels", "hidden": [bfloat16]}) with lengths that differ from batch to batch."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(num_batches):
        rows, width = (int(torch.randint(1, high, (), generator=generator)) for high in (5, 20))
        logits = torch.randn(rows, width, 3, generator=generator)
        labels = torch.randint(0, 9, (rows, width), generator=generator)
        batches.append((logits, {"labels": labels, "hidden": [torch.randn(rows, generator=generator).bfloat16()]}))
    return batches


def collected(batches: list[Any], budget: MemoryBudget | None, positions: Any = None) -> list[np.ndarray[Any, Any]]:
    container = EvalLoopContainer(budget=budget)
    for batch in batches:
        container.add(batch)
    num_rows = sum(len(logits) for logits, _ in batches)
    logits, rest = container.get_arrays(positions, num_rows)
    return [logits, rest["labels"], rest["hidden"][0]]


@pytest.mark.parametrize("limit_bytes", [1, 2000, 50_000])
@pytest.mark.parametrize("is_placed", [False, True])
def test_arrays_beyond_the_budget_equal_those_within(tmp_path: Path, limit_bytes: int, is_placed: bool) -> None:
    batches = ragged()
    num_rows = sum(len(logits) for logits, _ in batches)
    positions = np.random.default_rng(0).permutation(num_rows) if is_placed else None
    mapped = collected(batches, MemoryBudget(limit_bytes, tmp_path), positions)
    for actual, expected in zip(mapped, collected(batches, None, positions)):
        assert actual.dtype == expected.dtype and np.array_equal(actual, expected)
    assert isinstance(mapped[0], np.memmap) == (limit_bytes < 50_000)


def test_rows_are_put_where_the_positions_say() -> None:
    container = EvalLoopContainer()
    container.add(torch.tensor([[1], [2]]))
    container.add(torch.tensor([[3, 4], [5, 6]]))
    assert container.get_arrays(np.array([2, 0, 1]), 4).tolist() == [[2, -100], [3, 4], [1, -100]]


def test_no_more_is_held_than_the_budget_and_one_batch(tmp_path: Path) -> None:
    budget = MemoryBudget(1000, tmp_path)
    container = EvalLoopContainer(budget=budget)
    batch = torch.ones(4, 16)
    held = []
    for _ in range(100):
        container.add(batch.clone())
        held.append(budget.held_bytes)
        assert held[-1] == sum(rows.nbytes for rows in container._buffers._on_host)
    assert max(held) <= 1000 and len(set(held)) > 2  # it rises, and falls again
    array = container.get_arrays()
    assert array.nbytes == 100 * batch.nbytes and isinstance(array, np.memmap) and budget.held_bytes == 0


def test_batches_that_stay_within_the_budget_never_touch_the_disk(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(spill, "_nameless_file", lambda directory: pytest.fail("a file was made"))
    budget = MemoryBudget(10_000, tmp_path)
    container = EvalLoopContainer(budget=budget)
    for _ in range(10):
        container.add(torch.ones(4, 16))
    assert type(container.get_arrays()) is np.ndarray and budget.held_bytes == 0


def test_a_map_behaves_as_an_array(tmp_path: Path) -> None:
    container = EvalLoopContainer(budget=MemoryBudget(1, tmp_path))
    for value in range(5):
        container.add(torch.full((2, 3), value))
    labels = container.get_arrays()
    labels[labels == 3] = -100
    assert labels.sum() == 6 * (0 + 1 + 2 + 4) - 600 and labels.max() == 4
    assert np.where(labels < 0, 0, labels).tolist()[6] == [0, 0, 0]
    assert torch.from_numpy(labels).shape == (10, 3)


@pytest.mark.parametrize("second", [torch.float64, torch.int64])
def test_a_changing_dtype_gives_the_same_also_in_a_file(tmp_path: Path, second: torch.dtype) -> None:
    batches = [torch.full((2, width), 1.5).to(dtype) for width, dtype in ((2, torch.int32), (4, torch.int32))]
    batches += [torch.full((2, 4), 2.5).to(second), torch.full((2, 3), 7).to(torch.int32)]
    arrays = []
    for budget in (None, MemoryBudget(1, tmp_path)):
        container = EvalLoopContainer(budget=budget)
        for batch in batches:
            container.add(batch)
        arrays.append(container.get_arrays())
    assert arrays[0].dtype == arrays[1].dtype and np.array_equal(arrays[0], arrays[1])


def test_more_can_be_added_after_a_map_was_read(tmp_path: Path) -> None:
    container = EvalLoopContainer(budget=MemoryBudget(1, tmp_path))
    container.add(torch.tensor([1.0]))
    assert container.get_arrays().tolist() == [1.0]
    container.add(torch.tensor([2.0]))
    assert container.get_arrays().tolist() == [1.0, 2.0]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_files_have_no_name_and_are_gone_with_the_arrays(tmp_path: Path) -> None:
    def open_files() -> int:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
        return sum(str(tmp_path) in line for line in (*maps, *links))

    container = EvalLoopContainer(budget=MemoryBudget(1, tmp_path))
    for batch in ragged(10):
        container.add(batch)
    arrays = container.get_arrays()
    assert list(tmp_path.iterdir()) == [] and open_files() >= 3
    del container, arrays
    gc.collect()
    assert open_files() == 0


def _is_open(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


def test_arrays_are_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    """A cycle through the budget would keep gigabytes alive until the collector happens to run."""
    import weakref

    container = EvalLoopContainer(budget=MemoryBudget(10_000, tmp_path))
    container.add(torch.ones(3))
    container.add(torch.ones(3))
    array = container.get_arrays()
    gone = weakref.ref(array)
    gc.disable()
    try:
        del container, array
        assert gone() is None
    finally:
        gc.enable()


def test_a_full_disk_is_an_error_that_names_the_cure(tmp_path: Path, monkeypatch: Any) -> None:
    class Full:
        def write(self, content: Any) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "_nameless_file", lambda directory: Full())
    container = EvalLoopContainer(budget=MemoryBudget(1, tmp_path))
    with pytest.raises(OSError, match=r"eval_memory_budget_gib.*No space left.*preprocess_logits_for_metrics"):
        container.add(torch.ones(3))


def test_the_default_budget_is_half_of_the_free_memory_shared_by_the_processes(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(spill, "available_bytes", lambda: 8 * GIB)
    whole, shared = (MemoryBudget.of_run(None, str(tmp_path), n) for n in (1, 4))
    assert whole is not None and whole.limit_bytes == 4 * GIB and whole.directory == str(tmp_path)
    assert shared is not None and shared.limit_bytes == GIB
    given = MemoryBudget.of_run(0.5, str(tmp_path / "absent"), 4)
    assert given is not None and given.limit_bytes == GIB / 2 and os.path.isdir(given.directory)
    assert MemoryBudget.of_run(float("inf"), str(tmp_path)) is None
    monkeypatch.setattr(spill, "available_bytes", lambda: None)
    assert MemoryBudget.of_run(None, str(tmp_path)) is None


def test_a_container_leaves_what_its_limit_leaves(tmp_path: Path) -> None:
    for name, content in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 1\ninactive_file 200\n"),
    ):
        (tmp_path / name).write_text(content, encoding="ascii")
    assert spill._available_in_group(str(tmp_path)) == 1000 - 700 + 200
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert spill._available_in_group(str(tmp_path)) == spill._available_in_group(str(tmp_path / "absent")) == np.inf
