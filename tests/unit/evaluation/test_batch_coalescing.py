"""Batches appended in groups give what each by itself gives, and wait no longer than they may."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trainwright.evaluation.accumulator import Accumulator, LoopSettings
from trainwright.evaluation.batch_coalescing import MOST_BATCHES, MOST_BYTES, CoalescingAccumulator


def both(**settings: Any) -> tuple[CoalescingAccumulator, Accumulator]:
    """One that appends in groups, and one that appends the same batches one by one."""
    chosen = LoopSettings(**settings)
    return CoalescingAccumulator(chosen), Accumulator(chosen)


def in_order() -> None:
    """Rows are in the order of the dataset."""


def batch(index: int, rows: int = 3, width: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """inputs, loss, logits and labels, some of which are -100."""
    generator = torch.Generator().manual_seed(index)
    labels = torch.randint(0, 9, (rows, width), generator=generator)
    labels[:, : index % width] = -100
    logits = torch.randn(rows, width, 2, generator=generator).to(dtype)
    return {"x": torch.ones(rows, 5 + index % 2), "labels": labels}, torch.tensor(float(index)), logits, labels


SEQUENCES = {
    "alike": [{}] * 70,
    "a short last one": [*[{}] * 40, {"rows": 1}],
    "widths in blocks": [{"width": 2 + i // 5} for i in range(30)],
    "all different": [{"width": 1 + i % 4, "rows": 1 + i % 3} for i in range(20)],
    "dtypes": [{"dtype": (torch.float32, torch.float64)[i // 4 % 2]} for i in range(24)],
}


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulation_steps": 5},
        {"labels_are_shifted": True},
        {"loss_average": "batches"},
        {"prediction_loss_only": True},
        {"label_names": ("labels", "x")},
    ],
)
def test_groups_give_what_each_batch_alone_gives(sequence: list[Any], settings: dict[str, Any]) -> None:
    grouping, alone = both(**settings)
    for index, kind in enumerate(sequence):
        grouping.add(*batch(index, **kind))
        alone.add(*batch(index, **kind))
    mine, expected = grouping.result(None, in_order), alone.result(None, in_order)
    assert mine.num_rows == expected.num_rows
    for name in ("predictions", "label_ids", "losses", "items"):
        one, other = getattr(mine, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and np.array_equal(one, other))


def test_a_group_ends_after_its_most_batches() -> None:
    grouping, _ = both()
    for index in range(1 + MOST_BATCHES):
        assert len(grouping.num_rows) == min(index, 1)  # the first is appended by itself
        grouping.add(*batch(index))
    assert len(grouping.num_rows) == 1 + MOST_BATCHES


def test_a_group_ends_where_rows_are_moved_to_the_host() -> None:
    grouping, _ = both(accumulation_steps=5)
    seen = []
    for index in range(12):
        grouping.add(*batch(index))
        seen.append(len(grouping.num_rows))
    assert seen == [1, 1, 1, 1, 5, 5, 5, 5, 5, 10, 10, 10]


@pytest.mark.parametrize("kind", ["large", "slice", "other types", "graph"])
def test_a_batch_that_would_keep_much_alive_does_not_wait(kind: str) -> None:
    grouping, _ = both()
    for index in range(6):
        inputs, loss, logits, labels = batch(index)
        if kind == "large":
            logits = torch.zeros(3, MOST_BYTES // 8)
        elif kind == "slice":
            logits = torch.zeros(3, 100, 2)[:, -1]
        elif kind == "other types":
            logits = (logits, logits)
        else:
            loss = loss.requires_grad_() * 2
        grouping.add(inputs, loss, logits, labels)
        assert len(grouping.num_rows) == index + 1


def test_a_loader_that_uses_its_memory_again_still_has_its_labels_counted() -> None:
    grouping, alone = both(prediction_loss_only=True)
    memory = torch.empty(3, 4, dtype=torch.int64)
    for index in range(10):
        inputs, loss, _, labels = batch(index)
        memory.copy_(labels)
        grouping.add({**inputs, "labels": memory}, loss, None, None)
        alone.add(inputs, loss, None, None)
    assert np.array_equal(grouping.result(None, in_order).items, alone.result(None, in_order).items)  # type: ignore[arg-type]
