"""The only place that builds an Accelerator.

Owns: turning arguments into an Accelerator, on first need: one process on one device trains without it, and pays its
import (about a second) only when the user's code reads `trainer.accelerator`.
"""

from __future__ import annotations

from typing import Any


def build_accelerator(**kwargs: Any) -> Any:
    """An `accelerate.Accelerator`; keyword arguments that the installed release does not know are an error of
    accelerate's.
    """
    import accelerate

    return accelerate.Accelerator(**kwargs)


def accelerator_arguments(args: Any) -> dict[str, Any]:
    """Keyword arguments for `accelerate.Accelerator` that say what `args` (TrainingArguments) says."""
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

    config = args.accelerator_config
    accumulation = dict(config.gradient_accumulation_kwargs or {})
    # Updates are counted by our loop; a second count inside the Accelerator would disagree at an uneven last batch.
    accumulation.setdefault("num_steps", 1)
    accumulation.setdefault("sync_with_dataloader", False)
    kwargs: dict[str, Any] = {
        "dataloader_config": DataLoaderConfiguration(
            split_batches=config.split_batches,
            dispatch_batches=config.dispatch_batches,
            even_batches=config.even_batches,
            use_seedable_sampler=config.use_seedable_sampler,
            non_blocking=config.non_blocking,
            data_seed=args.data_seed if args.data_seed is not None else args.seed,
        ),
        "gradient_accumulation_plugin": GradientAccumulationPlugin(**accumulation),
        "cpu": args.use_cpu,
    }
    if args.fp16 or args.bf16:
        kwargs["mixed_precision"] = "fp16" if args.fp16 else "bf16"
    return kwargs
