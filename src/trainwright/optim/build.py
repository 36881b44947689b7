"""Builds an optimizer and a schedule for a model from a class, its arguments and the run's arguments.

Owns: the constructor conventions of the optimizer families, and which schedule a run gets. Leaves to others: which
class (`registry.py`), which groups (`groups.py`), wrapping for several devices (`parallel/`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainwright.importing import import_for_optimizers
from trainwright.names import SchedulerType
from trainwright.optim.greedy import GreedyLR
from trainwright.optim.schedules import get_scheduler


def build_optimizer(
    model: nn.Module, cls: Callable[..., Optimizer], kwargs: dict[str, Any], groups: list[dict[str, Any]]
) -> Optimizer:
    """`cls(groups, **kwargs)`, with the conventions of the optimizer families.

    In `kwargs`, "params" are groups that replace `groups`, "model" is passed where the class takes a model
    instead of parameters, "optimizer_dict" maps each parameter to its own optimizer. `kwargs` is not changed.
    """
    import_for_optimizers()
    kwargs = dict(kwargs)
    for name in ("model", "optimizer_dict"):
        if name in kwargs:
            return cls(kwargs.pop(name), **kwargs)
    optimizer = cls(kwargs.pop("params", groups), **kwargs)
    if type(optimizer).__module__.startswith("bitsandbytes.") and kwargs.get("optim_bits") == 8:
        from trainwright.optim.bitsandbytes_family import keep_embeddings_in_32_bits

        keep_embeddings_in_32_bits(model)
    return optimizer


def build_scheduler(args: Any, optimizer: Optimizer, num_training_steps: int) -> LRScheduler | GreedyLR:
    """The schedule that `args.lr_scheduler_type` names, over `num_training_steps` updates.

    `args` has `lr_scheduler_type`, `lr_scheduler_kwargs` (a dict, its JSON text, or None) and
    `get_warmup_steps(num_training_steps)`. A schedule that follows a metric follows it in the direction of
    `args.greater_is_better`, unless "mode" overrides it. Raises ValueError on a keyword the schedule does not take,
    TypeError where `optimizer` is a user's object that no schedule can drive.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"A schedule drives a torch.optim.Optimizer, and {type(optimizer).__name__} is none. Join several with "
            "trainwright.CombinedOptimizer([...]), derive yours from torch.optim.Optimizer, or pass a schedule with "
            "it: optimizers=(optimizer, scheduler)."
        )
    keywords = args.lr_scheduler_kwargs or {}
    keywords = json.loads(keywords) if isinstance(keywords, str) else dict(keywords)
    follows_metric = args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    if follows_metric and getattr(args, "greater_is_better", None):
        keywords.setdefault("mode", "max")
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(num_training_steps),
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=keywords,
    )
