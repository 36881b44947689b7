"""The only place that builds an Accelerator.

Owns: turning arguments into an Accelerator, on first need: one process on one device trains without it, and pays its
import (about a second) only when the user's code reads `trainer.accelerator`. Leaves to others: which device
(`args/device.py`).

accelerate holds precision, device and accumulation in dictionaries that all Accelerators of a process share, so a
second one with another precision is an error, or computes in the precision of the first. The one built here has a
separate copy, and leaves that of the script and of other Trainers unchanged.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from trainwright.args.device import world_size

# Methods that read the precision from accelerate's shared state; `autocast` is another.
_READ_SHARED_STATE = ("prepare_model", "prepare_optimizer", "prepare_scheduler", "prepare_data_loader")


def build_accelerator(args: Any, **kwargs: Any) -> Any:
    """An `accelerate.Accelerator(**kwargs)` for the run of `args`; keyword arguments that the installed release does
    not know are an error of accelerate's.

    Raises ValueError where accelerate would run with another device or number of processes than the run.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    _ = args.device  # joins the process group, with the timeouts of `args`: accelerate would make one without
    accelerator_class, accumulation_class = _classes()
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    if before[0]:
        _check_num_processes(PartialState().num_processes)
    if not args.accelerator_config.use_configured_state:
        AcceleratorState._shared_state.clear()
        if before[0] and PartialState().device.type != args.device.type:
            PartialState._shared_state.clear()
    try:
        accelerator = accelerator_class(**kwargs)
        _check_num_processes(accelerator.num_processes)
        if accelerator.device.type != args.device.type:
            raise ValueError(
                f"accelerate computes on {accelerator.device}, and the arguments on {args.device}: set use_cpu, or "
                "unset ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE, so that both say the same."
            )
        if args.fp16 and accelerator.device.type == "cpu":  # half_precision_backend="cpu_amp", unknown to accelerate
            accelerator.native_amp = True
        accelerator.state.__dict__ = dict(AcceleratorState._shared_state)
        accelerator.gradient_state = accumulation_class(accelerator.gradient_state.plugin_kwargs)
    except BaseException:
        _restore(shared, before)
        raise
    # What was empty stays filled: accelerate's loaders and helpers read ranks from it.
    _restore([now for now, then in zip(shared, before) if then], [then for then in before if then])
    return accelerator


def _restore(shared: list[Any], before: list[dict[str, Any]]) -> None:
    for now, then in zip(shared, before, strict=True):
        now.clear()
        now.update(then)


def _check_num_processes(of_accelerate: int) -> None:
    if of_accelerate != world_size():
        raise ValueError(
            f"accelerate knows of {of_accelerate} process{'es' if of_accelerate > 1 else ''}, and this run has "
            f"{world_size()}: they would all train on the same batches. Where the script makes an Accelerator or "
            "PartialState before the Trainer, on CPUs it needs cpu=True; where a launcher sets WORLD_SIZE, it must "
            "set LOCAL_RANK, too (torchrun and accelerate launch do)."
        )


@functools.cache
def _classes() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from accelerate import Accelerator as Base
    from accelerate.state import AcceleratorState, GradientState

    @contextlib.contextmanager
    def as_shared_state(state: dict[str, Any]) -> Iterator[None]:
        shared = AcceleratorState._shared_state
        before = dict(shared)
        _restore([shared], [state])
        try:
            yield
        finally:
            _restore([shared], [before])

    class Accelerator(Base):  # type: ignore[misc,unused-ignore]
        """An Accelerator with a private copy of precision, device and accumulation."""

        @contextlib.contextmanager
        def autocast(self, *args: Any, **kwargs: Any) -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                with as_shared_state(self.state.__dict__):  # not while the caller's code runs
                    stack.enter_context(super().autocast(*args, **kwargs))
                yield

    def with_private_state(name: str) -> Callable[..., Any]:
        inherited = getattr(Base, name)

        @functools.wraps(inherited)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with as_shared_state(self.state.__dict__):
                return inherited(self, *args, **kwargs)

        return method

    for name in _READ_SHARED_STATE:
        setattr(Accelerator, name, with_private_state(name))

    class AccumulationState(GradientState):  # type: ignore[misc,unused-ignore]
        """The active loader is shared by all Accelerators of a process; the accumulation is that of one."""

        __slots__ = ("plugin_kwargs",)

        def __init__(self, plugin_kwargs: dict[str, Any]) -> None:
            super().__init__()
            self.plugin_kwargs = dict(plugin_kwargs)

    return Accelerator, AccumulationState


def accelerator_arguments(args: Any) -> dict[str, Any]:
    """Keyword arguments for `accelerate.Accelerator` from `args` (TrainingArguments)."""
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

    config = args.accelerator_config
    # Our loop counts micro-batches and divides losses; the Accelerator would divide again.
    accumulation = {"sync_with_dataloader": False, **(config.gradient_accumulation_kwargs or {}), "num_steps": 1}
    return {
        "dataloader_config": DataLoaderConfiguration(
            split_batches=config.split_batches,
            dispatch_batches=config.dispatch_batches,
            even_batches=config.even_batches,
            use_seedable_sampler=config.use_seedable_sampler,
            non_blocking=config.non_blocking,
            data_seed=args.data_seed if args.data_seed is not None else args.seed,
        ),
        "gradient_accumulation_plugin": GradientAccumulationPlugin(**accumulation),
        # Without this accelerate runs several processes of a machine without a GPU as one process each.
        "cpu": args.use_cpu or (world_size() > 1 and args.device.type == "cpu"),
        "mixed_precision": args.mixed_precision,
    }
