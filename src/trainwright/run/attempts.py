"""One run in as many attempts as it takes: again from a checkpoint after a NaN, smaller after memory ran out.

Owns: when a failed attempt is followed by another one, what that one starts from, and a checkpoint after an exception
that ends the run. Leaves to others: the attempt itself and what it must put back (Trainer), whether a rollback helps
(`nonfinite`), running a micro-batch in parts (`oom_retry`), signals (`interrupt`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from trainwright.checkpoint.best import MetricNotFound
from trainwright.interrupt import rescue
from trainwright.names import SaveStrategy
from trainwright.nonfinite.updates import NonFiniteError, check_rollback
from trainwright.oom_retry import CannotRetry, find_executable_batch_size
from trainwright.run import resume

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments
    from trainwright.parallel.strategy import Strategy
    from trainwright.run.run import Run

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def run_to_its_end(
    run: Run,
    attempt: Callable[..., Result],
    model: nn.Module,
    strategy: Strategy,
    *,
    batch_size: int,
    current_step: Callable[[], int],
    load_weights: Callable[[str], None],
    start_over: Callable[[int, dict[str, torch.Tensor]], None],
    finish_saves: Callable[[], None],
    save: Callable[[], None],
) -> Result:
    """`attempt(resume_from_checkpoint=, batch_size=)` until one succeeds, or fails in a way that no other one would
    help. With `save_on_exception` an exception ends the run with a checkpoint of its last step.

    batch_size: samples of a micro-batch, of one process. current_step: gives the number of updates that are done.
    load_weights: of a checkpoint. start_over: see `retry_smaller`. finish_saves: waits for the save in flight and
    does what follows it. save: writes a checkpoint.
    """

    def retried(checkpoint: str | None) -> Result:
        return retry_smaller(
            functools.partial(attempt, resume_from_checkpoint=checkpoint),
            run.args,
            batch_size,
            model,
            nothing_is_done=nothing_is_done,
            start_over=start_over,
        )

    def nothing_is_done() -> bool:
        """Whether this attempt has made no update yet, nor a part of one, so that starting over loses nothing."""
        is_alone = not (run.changes_weights_in_backward or strategy.is_distributed)
        return is_alone and run.first_step in (None, current_step())

    def roll_back(error: NonFiniteError) -> str:
        finish_saves()
        last = run.saves.last_checkpoint
        excluded = check_rollback(error, run.args.nonfinite, last, run.excluded)
        checkpoint = resume.find_checkpoint(last, run.output_dir, strategy.is_main)
        assert checkpoint is not None
        run.excluded = excluded
        run.undo.close()
        load_weights(checkpoint)
        return checkpoint

    try:
        return with_rollback(retried, run.checkpoint, roll_back)
    except Exception as error:
        if not strategy.is_distributed:  # other processes may be gone: no collective is called any more
            try:
                finish_saves()
            except Exception as failure:
                logger.error("The save in flight failed as well: %s: %s", type(failure).__name__, failure)
        has_no_metric = isinstance(error, MetricNotFound) and not strategy.is_distributed
        is_wanted = run.args.save_on_exception or (has_no_metric and run.args.save_strategy != SaveStrategy.NO)
        if is_wanted and run.first_step is not None:  # else this run has made no step
            rescue(
                error,
                save,
                step=current_step(),
                is_saved=run.saves.saved_step == current_step(),
                is_between_steps=not run.is_mid_step,
            )
        raise


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
    args: TrainingArguments,
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
