"""One run in as many attempts as it takes: again from a checkpoint after a NaN, smaller after memory ran out.

Owns: when a failed attempt is followed by another one, and what that one starts from. Leaves to others: the attempt
itself and what it must put back (Trainer), whether a rollback helps (`finite`), running a micro-batch in parts
(`oom_retry`), signals (`interrupt`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from trainwright.nonfinite.updates import NonFiniteError
from trainwright.oom_retry import CannotRetry, find_executable_batch_size

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def with_rollback(
    attempt: Callable[[str | None], Result], checkpoint: str | None, roll_back: Callable[[NonFiniteError], str]
) -> Result:
    """`attempt(checkpoint)`, and after each NaN another one from the checkpoint that `roll_back` went back to.

    `roll_back` raises the error where `nonfinite` asks for no rollback, or there is nothing to go back to.
    """
    while True:
        try:
            return attempt(checkpoint)
        except NonFiniteError as error:
            checkpoint = roll_back(error)


def retry_smaller(
    attempt: Callable[..., Result],
    args: Any,
    batch_size: int,
    model: nn.Module,
    *,
    nothing_is_done: Callable[[], bool],
    start_over: Callable[[int, dict[str, torch.Tensor]], None],
) -> Result:
    """`attempt(batch_size=)`, and what `args.auto_find_batch_size` does when memory runs out.

    In mode "restart", and where a micro-batch cannot be run in parts before anything is done (`nothing_is_done()`), the
    micro-batch is halved after each out-of-memory error and the run starts over with `start_over(batch_size, weights)`
    from the weights that `model` had.
    """
    if not args.auto_find_batch_size:
        return attempt(batch_size=batch_size)
    first_size = batch_size
    if args.auto_find_batch_size_mode != "restart":
        try:
            return attempt(batch_size=batch_size)
        except CannotRetry as error:
            if not nothing_is_done():
                raise
            logger.warning("%s The run starts again with half the batch size.", error)
        first_size = batch_size // 2
    weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def with_size(size: int) -> Result:
        if size != batch_size:
            start_over(size, weights)
        return attempt(batch_size=size)

    result: Result = find_executable_batch_size(with_size, first_size, auto_find_batch_size=True)()
    return result
