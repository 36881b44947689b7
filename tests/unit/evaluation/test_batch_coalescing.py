"""Batches taken together give what each by itself gives, and wait no longer than they may."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trainwright.evaluation.accumulator import Collector
from trainwright.evaluation.batch_coalescing import MOST_BATCHES, MOST_BYTES, Runs
from trainwright.evaluation.prediction_store import KeptRows
from trainwright.evaluation.settings import LoopSettings


def both(**settings: Any) -> tuple[Runs, Collector, Collector]:
    """Runs, the collector behind them, and one that takes the same batches by itself."""
    chosen = LoopSettings(**settings)
    rows = [KeptRows(True, None) for _ in range(2)]
    behind, alone = Collector(chosen, rows[0]), Collector(chosen, rows[1])
    return Runs(behind, rows[0]), behind, alone


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
def test_runs_collect_what_each_batch_alone_gives(sequence: list[Any], settings: dict[str, Any]) -> None:
    runs, _, alone = both(**settings)
    for index, kind in enumerate(sequence):
        runs.add(*batch(index, **kind))
        alone.add(*batch(index, **kind))
    mine, expected = runs.collected(None, None), alone.collected(None, None)
    assert mine.num_rows == expected.num_rows
    for name in ("predictions", "label_ids", "losses", "items"):
        one, other = getattr(mine, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and np.array_equal(one, other))


def test_a_run_ends_after_its_most_batches() -> None:
    runs, behind, _ = both()
    for index in range(1 + MOST_BATCHES):
        assert len(behind.num_rows) == min(index, 1)  # the first is taken by itself
        runs.add(*batch(index))
    assert len(behind.num_rows) == 1 + MOST_BATCHES


def test_a_run_ends_where_rows_are_moved_to_the_host() -> None:
    runs, behind, _ = both(accumulation_steps=5)
    seen = []
    for index in range(12):
        runs.add(*batch(index))
        seen.append(len(behind.num_rows))
    assert seen == [1, 1, 1, 1, 5, 5, 5, 5, 5, 10, 10, 10]


@pytest.mark.parametrize("kind", ["large", "slice", "other types", "graph"])
def test_a_batch_that_would_keep_much_alive_does_not_wait(kind: str) -> None:
    runs, behind, _ = both()
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
        runs.add(inputs, loss, logits, labels)
        assert len(behind.num_rows) == index + 1


def test_a_loader_that_uses_its_memory_again_still_has_its_labels_counted() -> None:
    runs, _, alone = both(prediction_loss_only=True)
    memory = torch.empty(3, 4, dtype=torch.int64)
    for index in range(10):
        inputs, loss, _, labels = batch(index)
        memory.copy_(labels)
        runs.add({**inputs, "labels": memory}, loss, None, None)
        alone.add(inputs, loss, None, None)
    assert np.array_equal(runs.collected(None, None).items, alone.collected(None, None).items)  # type: ignore[arg-type]
