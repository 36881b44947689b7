"""The disk that the checkpoints of a run need, against what is free.

Owns: how many there are at once and how large each is. Leaves to others: refusing to start where not even one fits
(`checkpoint/save_failures`), deleting the older ones (`checkpoint/layout`).
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from trainwright.checkpoint.save_failures import predicted_bytes

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments


def disk_of(
    args: TrainingArguments,
    model: nn.Module,
    *,
    optimizer: Any,
    optimizer_bytes: int | None,
    average_bytes: int,
    shared_bytes: int,
    num_saves: int | None,
    num_evaluations: int | None,
) -> dict[str, Any]:
    """Sizes in bytes, without small files (tokenizer, generators, arguments: some 100 KB).

    optimizer_bytes: what it keeps; None: as far as it is known by its name. shared_bytes: of each checkpoint, those
    that all but the first link to. num_saves: None where metrics decide, which is after evaluations only.
    """
    weights = predicted_bytes(model, None)[0]
    kept = 0
    if not args.save_only_model and optimizer is not None:
        kept = optimizer_bytes if optimizer_bytes is not None else predicted_bytes(model, optimizer)[1] - weights
    most = num_saves if num_saves is not None else num_evaluations
    limit = args.save_total_limit
    at_once = most
    if limit is not None and limit > 0:  # and one more while it is written
        at_once = limit + 1 if most is None else min(most, limit + 1)
    one = weights + kept + average_bytes
    needed = None if at_once is None else (one - shared_bytes) * at_once + (shared_bytes if at_once else 0)
    return {
        "output_dir": str(args.output_dir),
        "weights_bytes": weights,
        "optimizer_bytes": kept,
        "average_bytes": average_bytes,
        "checkpoint_bytes": one,
        "shared_bytes": shared_bytes,
        "save_total_limit": limit,
        "checkpoints": num_saves,
        "checkpoints_at_once": at_once,
        "needed_bytes": needed,
        "free_bytes": free_bytes(str(args.output_dir)),
    }


def free_bytes(path: str) -> int | None:
    """What is free where `path` is, or will be made; None where the system does not say."""
    path = os.path.abspath(path)
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    try:
        total, _, free = shutil.disk_usage(path)
    except OSError:
        return None
    return free if total else None
