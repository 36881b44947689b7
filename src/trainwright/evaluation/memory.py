"""How much memory a stage of the Trainer used, on the host and on the first accelerator.

Owns: reading the counters at both ends of a stage and the sampling thread between. Leaves to others: printing.
Source: seed 001, `log_metrics`, "memory report". It costs a sample each millisecond, so it is off by default.
"""

from __future__ import annotations

import gc
import sys
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

from trainwright.interop.optional import require

SAMPLING_INTERVAL_S = 0.001


@dataclass
class _Counter:
    """Bytes in use at both ends of a stage and the most in between."""

    begin: int
    end: int = 0
    peak: int = 0

    @property
    def alloc(self) -> int:
        """What the stage still holds; negative where it freed more."""
        return self.end - self.begin

    @property
    def peaked(self) -> int:
        """What it used on top of that for a while."""
        return max(0, self.peak - self.end)


class TrainerMemoryTracker:
    """Adds `{stage}_mem_{cpu,gpu}_{alloc,peaked}_delta` (bytes) to a stage's metrics.

    `start()` and `stop_and_update_metrics()` are called inside `__init__`, `train`, `evaluate` or `predict`; that names
    the stage. A stage inside another is not tracked: the accelerator has a single peak counter. What `__init__` used is
    reported with the first stage that finishes. Raises MissingExtra without psutil, unless told to skip.
    """

    stages: ClassVar[dict[str, str]] = {
        "__init__": "init",
        "train": "train",
        "_inner_training_loop": "train",
        "_finalize_training": "train",
        "evaluate": "eval",
        "predict": "test",
    }

    def __init__(self, skip_memory_metrics: bool = False) -> None:
        self.skip_memory_metrics = skip_memory_metrics
        if skip_memory_metrics:
            return
        psutil = require("psutil", "skip_memory_metrics=False (the memory report)", extra="memory")
        import torch

        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        module = getattr(torch, accelerator.type) if accelerator else None
        self._device: Any = module if hasattr(module, "max_memory_allocated") else None  # MPS has no peak counter
        self._process = psutil.Process()
        self._cpu: dict[str, _Counter] = {}
        self._gpu: dict[str, _Counter] = {}
        self._stop_monitor = threading.Event()
        self._monitor: threading.Thread | None = None
        self.cpu_mem_used_peak = 0  # bytes, of the current stage
        self.cur_stage: str | None = None
        self.init_reported = False

    def _running_stages(self) -> list[str]:
        """Stages of the methods on the call stack, innermost first. Raises ValueError where there is none."""
        running, frame = [], sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_name in self.stages:
                running.append(self.stages[frame.f_code.co_name])
            frame = frame.f_back  # type: ignore[assignment]
        if not running:
            raise ValueError(f"memory is tracked inside a method named one of {sorted(self.stages)}; none is running.")
        return running

    def derive_stage(self) -> str:
        """The stage of the nearest caller that has one. Raises ValueError where none has."""
        return self._running_stages()[0]

    def cpu_mem_used(self) -> int:
        """Resident memory of this process in bytes, shared pages included, swapped ones not."""
        return int(self._process.memory_info().rss)

    def peak_monitor_func(self) -> None:
        """Body of the sampling thread: keep the highest reading until the stage ends."""
        while not self._stop_monitor.wait(SAMPLING_INTERVAL_S):
            self.cpu_mem_used_peak = max(self.cpu_mem_used_peak, self.cpu_mem_used())

    def start(self) -> None:
        """Begin the stage named by the caller; does nothing inside another stage."""
        if self.skip_memory_metrics:
            return
        stage, *outer = self._running_stages()
        if self.cur_stage in outer and self.cur_stage != stage:
            return
        self._end_monitor()  # of a stage that an exception ended
        self.cur_stage = stage
        gc.collect()
        if self._device is not None:
            self._device.reset_peak_memory_stats()
            self._device.empty_cache()
            self._gpu[stage] = _Counter(begin=self._device.memory_allocated())
        self._cpu[stage] = _Counter(begin=self.cpu_mem_used())
        self.cpu_mem_used_peak = self._cpu[stage].begin
        self._stop_monitor.clear()
        self._monitor = threading.Thread(target=self.peak_monitor_func, daemon=True, name="memory-peak")
        self._monitor.start()

    def stop(self, stage: str) -> None:
        """End `stage` and read its counters; does nothing where another stage is current."""
        if self.cur_stage is None or self.cur_stage != stage:
            return
        self._end_monitor()
        gc.collect()
        if self._device is not None:
            self._device.empty_cache()
            self._gpu[stage].end = self._device.memory_allocated()
            self._gpu[stage].peak = self._device.max_memory_allocated()
        self._cpu[stage].end = self.cpu_mem_used()
        self._cpu[stage].peak = self.cpu_mem_used_peak
        self.cur_stage = None

    def _end_monitor(self) -> None:
        if self._monitor is not None:
            self._stop_monitor.set()
            self._monitor.join()
            self._monitor = None

    def update_metrics(self, stage: str, metrics: dict[str, Any]) -> None:
        """Add what `stage` used to `metrics`, and before the first such report what `init` used."""
        if self.skip_memory_metrics or self.cur_stage is not None:
            return
        report_init = not self.init_reported and "init" in self._cpu
        self.init_reported = True
        for name in dict.fromkeys(["init", stage] if report_init else [stage]):
            for quantity in ("alloc", "peaked"):
                for device, counters in (("cpu", self._cpu), ("gpu", self._gpu)):
                    if name in counters:
                        metrics[f"{name}_mem_{device}_{quantity}_delta"] = getattr(counters[name], quantity)
        if report_init:
            for device, counters in (("cpu", self._cpu), ("gpu", self._gpu)):
                if "init" in counters:
                    metrics[f"before_init_mem_{device}"] = counters["init"].begin

    def stop_and_update_metrics(self, metrics: dict[str, Any] | None = None) -> None:
        """End the stage named by the caller and add what it used to `metrics`; does nothing inside another stage."""
        if self.skip_memory_metrics:
            return
        stage = self.derive_stage()
        if self.cur_stage != stage:
            return
        self.stop(stage)
        if metrics is not None:
            self.update_metrics(stage, metrics)
