"""Speed of a run: samples, steps and tokens per second, and MFU, the share of the device's peak that the model uses.

Owns: `SpeedMeter`, `ModelFlops`. Leaves to others: counting tokens (`tokens`), peaks of devices (`peaks`), when a line
is written. Counts on the host only: nothing is read from the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from trainwright.nested import find_batch_size
from trainwright.profiling.peaks import peak_tflops_per_s
from trainwright.profiling.phases import Function

logger = logging.getLogger(__name__)

PAUSES = ("evaluation", "saving")  # not training: speeds leave their time out


class SpeedMeter:
    """Speeds of training since the last line, over all processes.

    flops_of: floating-point operations that training on a micro-batch of this process takes, forward and backward; None
        where the use of the peak is not wanted. peak_flops_per_s: of all devices of the run together.
    first_step, first_tokens: the counts when the run begins.
    """

    def __init__(
        self,
        *,
        num_processes: int = 1,
        flops_of: Callable[[Any], float] | None = None,
        peak_flops_per_s: float | None = None,
        first_step: int = 0,
        first_tokens: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._num_processes, self._clock = num_processes, clock
        self._peak_flops_per_s = peak_flops_per_s
        self._flops_of = flops_of if peak_flops_per_s else None
        self._samples, self._flops, self._paused_s = 0, 0.0, 0.0
        self._start = self._last = (clock(), first_step, first_tokens, 0, 0.0)

    def add(self, inputs: Any) -> None:
        """Count a micro-batch of this process."""
        self._samples += find_batch_size(inputs) or 0
        if self._flops_of is not None:
            self._flops += self._flops_of(inputs)

    def span(self, phase: str, function: Function) -> Function:
        """Exclude the time of evaluations and saves."""
        if phase not in PAUSES:
            return function

        def paused(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                self._paused_s += self._clock() - start

        return paused  # type: ignore[return-value]

    def close(self) -> None:
        """No-op."""

    def line(self, step: int, num_tokens: int) -> dict[str, float]:
        """Speeds since the last line. `num_tokens`: seen so far by all processes; `mfu`: a share between 0 and 1."""
        before, self._last = self._last, self._now(step, num_tokens)
        seconds, steps, tokens, samples, flops = (now - then for now, then in zip(self._last, before))
        if seconds <= 0:  # a coarse clock can read the same twice
            return {}
        speeds = {"samples_per_second": round(samples / seconds, 3), "steps_per_second": round(steps / seconds, 3)}
        if tokens:
            speeds["tokens_per_second"] = round(tokens / seconds, 3)
        return {**speeds, **self._use_of_peak("mfu", flops, seconds)}

    def total(self, step: int, num_tokens: int) -> dict[str, float]:
        """`train_mfu` of the whole run, where it is known."""
        seconds, _, _, _, flops = (now - then for now, then in zip(self._now(step, num_tokens), self._start))
        return self._use_of_peak("train_mfu", flops, seconds)

    def _now(self, step: int, num_tokens: int) -> tuple[float, int, int, int, float]:
        processes = self._num_processes
        return self._clock() - self._paused_s, step, num_tokens, self._samples * processes, self._flops * processes

    def _use_of_peak(self, name: str, flops: float, seconds: float) -> dict[str, float]:
        if not flops or self._peak_flops_per_s is None or seconds <= 0:
            return {}
        return {name: float(f"{flops / seconds / self._peak_flops_per_s:.4g}")}


class ModelFlops:
    """Floating-point operations of training on a batch, counted by torch on the first one.

    One forward pass, whose matrix products, convolutions and attention are counted, times 3: a backward pass makes two
    products for each of the forward's. What activation checkpointing computes again is not counted, as "model FLOPs"
    means. For batches of another size the count is scaled.
    `forward(inputs)`: runs the model without side effects.
    """

    def __init__(self, forward: Callable[[Any], Any], main_input_name: str) -> None:
        self._forward, self._input_name = forward, main_input_name
        self._per_element: float | None = None

    def __call__(self, inputs: Any) -> float:
        size = self._size(inputs)
        if self._per_element is None:
            self._per_element = self._count(inputs) / size if size else 0.0
        return self._per_element * size

    def _count(self, inputs: Any) -> float:
        try:
            with FlopCounterMode(display=False, custom_mapping=_attention_of_cpus()) as counter:
                self._forward(inputs)
        except Exception as error:  # a model that compute_loss calls in another way
            logger.warning(
                "log_speed: the model's floating-point operations cannot be counted (%s: %s), so there is no mfu. "
                "Override floating_point_ops(inputs) to say how many a batch takes.",
                type(error).__name__,
                error,
            )
            return 0.0
        return 3.0 * float(counter.get_total_flops())

    def _size(self, inputs: Any) -> int:
        main = inputs.get(self._input_name) if isinstance(inputs, Mapping) or hasattr(inputs, "get") else None
        return main.numel() if isinstance(main, torch.Tensor) else find_batch_size(inputs) or 0


def _attention_of_cpus() -> dict[Any, Any]:
    """torch counts the attention of GPUs; that of CPUs is another operator."""
    operator = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

    def count(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    return {} if operator is None else {operator: count}


def peak_of(device: torch.device, dtype: torch.dtype, given_tflops_per_s: float | None) -> float | None:
    """FLOP/s of one device: the user's value, else the table's; None, with a hint, where neither is known."""
    if given_tflops_per_s is not None:
        return given_tflops_per_s * 1e12
    if device.type != "cuda":  # ROCm is "cuda" to torch
        logger.info("log_speed: no mfu on %s without peak_tflops_per_s.", device.type)
        return None
    name = torch.cuda.get_device_name(device)
    peak = peak_tflops_per_s(name, dtype, tf32=torch.backends.cuda.matmul.allow_tf32)
    if peak is None:
        logger.warning(
            "log_speed: the peak of %s in %s is not known, so there is no mfu. Pass peak_tflops_per_s (dense).",
            name,
            str(dtype).removeprefix("torch."),
        )
        return None
    return peak * 1e12
