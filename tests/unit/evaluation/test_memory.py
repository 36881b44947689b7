"""The memory report: stages, nesting, and that allocations are seen."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from trainwright.evaluation.memory import TrainerMemoryTracker
from trainwright.interop.optional import MissingExtra

pytest.importorskip("psutil")
MIB = 2**20


class Run:
    """Has the method names that stages are derived from."""

    def __init__(self, skip: bool = False) -> None:
        self.tracker = TrainerMemoryTracker(skip)
        self.tracker.start()
        self.tracker.stop_and_update_metrics()
        self.inner: dict[str, int] = {}

    def evaluate(self, fail: bool = False) -> dict[str, int]:
        self.tracker.start()
        if fail:
            raise RuntimeError("in the middle of a stage")
        metrics: dict[str, int] = {}
        self.tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(self) -> dict[str, int]:
        self.tracker.start()
        metrics: dict[str, int] = {}
        self.tracker.stop_and_update_metrics(metrics)
        return metrics

    def train(self) -> dict[str, int]:
        self.tracker.start()
        kept = bytearray(64 * MIB)
        kept[:: 2**10] = b"x" * len(kept[:: 2**10])  # touch the pages
        spike = bytearray(96 * MIB)
        spike[:: 2**10] = b"x" * len(spike[:: 2**10])
        while self.tracker.cpu_mem_used_peak < self.tracker.cpu_mem_used():
            pass  # until the sampling thread has seen it
        del spike
        self.inner = self.evaluate()
        metrics: dict[str, int] = {}
        self.tracker.stop_and_update_metrics(metrics)
        del kept
        return metrics

    def outside(self) -> None:
        self.tracker.start()


def cpu_keys(metrics: dict[str, Any]) -> list[str]:
    return [key for key in metrics if "gpu" not in key]


def test_init_is_reported_with_the_first_stage_only() -> None:
    run = Run()
    stage_keys = [f"{stage}_mem_cpu_{quantity}_delta" for stage in ("init", "test") for quantity in ("alloc", "peaked")]
    assert cpu_keys(run.predict()) == [*stage_keys, "before_init_mem_cpu"]
    assert cpu_keys(run.evaluate()) == ["eval_mem_cpu_alloc_delta", "eval_mem_cpu_peaked_delta"]


def test_keys_and_stages_are_those_of_the_installed_release(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pytest.importorskip("transformers.trainer_utils")
    mine = Run()
    monkeypatch.setitem(globals(), "TrainerMemoryTracker", reference.TrainerMemoryTracker)
    theirs = Run()
    assert type(mine.tracker) is not type(theirs.tracker)
    assert mine.tracker.stages.items() >= theirs.tracker.stages.items()
    assert list(mine.predict()) == list(theirs.predict())
    assert list(mine.evaluate()) == list(theirs.evaluate())


def test_what_a_stage_keeps_and_what_it_used_for_a_while_are_told_apart() -> None:
    metrics = Run().train()
    assert 60 * MIB < metrics["train_mem_cpu_alloc_delta"] < 90 * MIB
    assert 60 * MIB < metrics["train_mem_cpu_peaked_delta"] < 120 * MIB


def test_a_stage_inside_another_is_not_tracked() -> None:
    run = Run()
    metrics = run.train()
    assert run.inner == {} and "train_mem_cpu_alloc_delta" in metrics


def test_a_stage_that_failed_does_not_block_the_next() -> None:
    run = Run()
    with pytest.raises(RuntimeError, match="middle"):
        run.evaluate(fail=True)
    assert "test_mem_cpu_alloc_delta" in run.predict()


def test_skipping_reports_nothing() -> None:
    run = Run(skip=True)
    assert run.evaluate() == {}
    run.outside()


def test_a_caller_without_a_stage_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="predict"):
        Run().outside()


def test_without_psutil_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingExtra, match=r"trainwright\[memory\]"):
        TrainerMemoryTracker()
    assert TrainerMemoryTracker(skip_memory_metrics=True).skip_memory_metrics
