"""The profilers of a run, from its arguments.

Owns: building the profilers. Leaves to others: what each does (`breakdown`, `speed`, `profile`), and wrapping the
phases (Trainer).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainwright.interop.models import undisturbed
from trainwright.parallel.strategy import Strategy
from trainwright.profiling.breakdown import TimeBreakdown
from trainwright.profiling.phases import Profilers
from trainwright.profiling.speed import ModelFlops, SpeedMeter, peak_of
from trainwright.profiling.trace import StepProfiler

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments
    from trainwright.interop.model_facts import ModelFacts
    from trainwright.state import TrainerState


def profilers_for(
    args: TrainingArguments,
    *,
    strategy: Strategy,
    facts: ModelFacts,
    state: TrainerState,
    model: nn.Module,
    flops_of: Callable[[Any], float] | None,
    prepare_inputs: Callable[[Any], Any],
    drops_labels: bool,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Profilers:
    """Those that `args` ask for, of a run that begins at `state`.

    facts: of `model`. flops_of: see `SpeedMeter`; None: counted on the first batch with the model's `forward`, without
    labels if `drops_labels`.
    """
    device, speed, profiler = strategy.device, None, None
    if args.log_speed:

        def forward(inputs: Any) -> None:
            inputs = {
                name: value for name, value in prepare_inputs(inputs).items() if not (drops_labels and name == "labels")
            }
            with undisturbed(model, inputs), autocast():
                model.forward(**inputs)  # not __call__, which may be compiled, and would be compiled once more

        num_devices = strategy.num_processes * strategy.tp_size * facts.num_replicas
        peak = peak_of(device, _dtype_of_products(args, model), args.peak_tflops_per_s)
        speed = SpeedMeter(
            num_processes=strategy.num_processes,
            flops_of=flops_of or ModelFlops(forward, facts.main_input_name),
            peak_flops_per_s=None if peak is None else peak * num_devices,
            first_step=state.global_step,
            first_tokens=state.num_input_tokens_seen,
        )
    if isinstance(args.profile_steps, dict):  # as it is once the arguments are made
        folder, rank = str(args.output_dir), strategy.process_index
        profiler = StepProfiler(args.profile_steps, folder, lambda: state.global_step, rank)
    return Profilers(TimeBreakdown.for_run(args.time_breakdown, device), speed, profiler)


def _dtype_of_products(args: Any, model: nn.Module) -> torch.dtype:
    """The type that most of the model's matrix products are computed in."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
