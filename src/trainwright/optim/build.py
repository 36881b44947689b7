"""An optimizer and a schedule for a model, out of a class, its arguments and the run's arguments.

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
from trainwright.optim.greedy import GreedyLR
from trainwright.optim.schedules import get_scheduler


def build_optimizer(
    model: nn.Module, cls: Callable[..., Optimizer], kwargs: dict[str, Any], groups: list[dict[str, Any]]
) -> Optimizer:
    """`cls(groups, **kwargs)`, with the conventions that families of optimizers have.

    In `kwargs`, "params" are groups that take the place of `groups`, "model" is passed where the class takes a model
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
    `get_warmup_steps(num_training_steps)`. ValueError on a keyword the schedule does not take.
    """
    keywords = args.lr_scheduler_kwargs or {}
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(num_training_steps),
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=json.loads(keywords) if isinstance(keywords, str) else keywords,
    )
