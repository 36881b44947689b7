"""The saves of a run, one after the other, and what became of each.

Owns: refusing weights that are not finite, tolerating a disk that fails, the save that is written in the background
(`async_save`), where checkpoints are staged, and the last one. It is asked, and calls no hook. Leaves to others: what a
checkpoint holds, and what follows one that is durable (`Trainer._after_saves`), background writing (asynchronous.py).
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from trainwright.checkpoint import commit
from trainwright.checkpoint.frozen import FrozenWeights
from trainwright.checkpoint.layout import Record, checkpoint_name, continued, note, sort_checkpoints, wrote
from trainwright.checkpoint.paths import is_ours
from trainwright.checkpoint.save import staged
from trainwright.checkpoint.save_failures import SaveFailures, predicted_bytes
from trainwright.checkpoint.sharded import PART_FOLDERS
from trainwright.checkpoint.weights import check_can_be_held
from trainwright.names import SaveStrategy
from trainwright.nonfinite.weights import NonFiniteWeights, checkable_tensors, may_be_saved, nonfinite_tensors

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer

    from trainwright.args.training import TrainingArguments
    from trainwright.checkpoint.asynchronous import AsyncSaves
    from trainwright.nonfinite.guard import NonFiniteGuard
    from trainwright.parallel.strategy import Strategy
    from trainwright.state import TrainerState

logger = logging.getLogger(__name__)

HOOKS_THAT_WRITE = (
    "_save_checkpoint",
    "save_model",
    "_save",
    "_save_optimizer_and_scheduler",
    "_save_scaler",
    "_save_rng_state",
)


@dataclass
class Save:
    """One save of a run, until what became of it is known."""

    directory: str
    step: int
    epoch: float | None
    state: TrainerState
    # Metric, step and directory of the best checkpoint before the evaluation of this step; None: there was none.
    best_before: tuple[Any, Any, Any] | None = None
    run: Record | None = None  # that makes it
    is_staged: bool = False  # by `Saves.staged`; not by an override that writes its checkpoint in another way
    has_failed: bool = False

    @contextmanager
    def at_its_step(self) -> Iterator[None]:
        """Within, the state has the step of this save: events name a checkpoint by `state.global_step`."""
        state = self.state
        now = state.global_step, state.epoch
        state.global_step, state.epoch = self.step, self.epoch
        try:
            yield
        finally:
            state.global_step, state.epoch = now

    def fail(self) -> None:
        """Where this would have been the best checkpoint, the best that can be loaded is that of before."""
        self.has_failed = True
        is_lost = not wrote(self.run, self.directory)  # what is there may be an earlier run's
        if self.best_before and self.state.best_global_step == self.step and is_lost:
            best = self.best_before
            self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = best


class Saves:
    """Of one run. The story asks `finished` which saves are durable: after a save, after a step while one is in
    flight, before the best metric is judged, and at the end.

        with saves.one(run_dir, state) as save:
            if save is not None:
                ...  # write, into saves.staged(...)
        for save in saves.finished():
            with saves.concluding(save):
                ...  # push, rotate
    """

    def __init__(self, strategy: Strategy, frozen: FrozenWeights) -> None:
        self.frozen = frozen  # weights that the checkpoints share
        self.last_checkpoint: str | None = None  # of this run; what a rollback goes back to
        self.run: Record | None = None  # that its checkpoints name as theirs
        self.saved_step = 0  # the last step with nothing to lose: it has a checkpoint, or the run began there
        self.asynchronous: AsyncSaves | None = None  # with `async_save`, while a run may save
        self._strategy = strategy
        self._model: nn.Module | None = None
        self._guard: NonFiniteGuard | None = None
        self._current: Save | None = None  # that is being made
        self._in_flight: Save | None = None
        self._finished: list[Save] = []  # durable, and not asked for yet

    def begin_run(self, checkpoint: str | None, run_dir: str, jobs: Sequence[str] = ()) -> None:
        """A run begins at `checkpoint` (None: anew), which saves into `run_dir`; `jobs`: of which it is part."""
        self.last_checkpoint = checkpoint
        others = sort_checkpoints(run_dir) if os.path.isdir(run_dir) else []
        self.run = continued(checkpoint, [path for path in others if is_ours(path)], jobs)

    def begin(
        self,
        args: TrainingArguments,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        guard: NonFiniteGuard | None,
        exempt: Container[str],
        trainer_class: str,
        overridden: Sequence[str],
    ) -> None:
        """An attempt at a run begins. Starts the process that writes, where `args.async_save` leaves it something to
        do: `overridden` are those of HOOKS_THAT_WRITE that `trainer_class` overrides.

        `model`: whose weights are looked at before each save, but for those named in `exempt`.
        """
        self.failures = SaveFailures(args.max_save_failures)
        self._policy, strategy = args.nonfinite, self._strategy
        self._model, self._guard, self._exempt = model, guard, exempt
        writes_weights = {"_save_checkpoint", "save_model", "_save"}.isdisjoint(overridden)
        if args.save_strategy != SaveStrategy.NO and args.save_safetensors and writes_weights:
            check_can_be_held(model)
        if not args.async_save or self.asynchronous is not None:
            return
        from trainwright.checkpoint.asynchronous import AsyncSaves

        self.asynchronous = AsyncSaves.for_run(
            args,
            trainer_class,
            list(overridden),
            predicted_bytes(model, None if args.save_only_model else optimizer, of_part=strategy.writes_parts)[1],
            strategy=strategy,
        )

    # -- making one ----------------------------------------------------------------------------------------------------

    def wait(self, step: int) -> None:
        """Wait for the save in flight, because that of `step` is to begin."""
        if self.asynchronous is not None:
            self.asynchronous.wait_before(step)

    @contextmanager
    def one(
        self, run_dir: str, state: TrainerState, best_before: tuple[Any, Any] | None = None
    ) -> Iterator[Save | None]:
        """Around the writing of the checkpoint of this step into `run_dir`. None is to be written where the weights are
        not finite (NonFiniteError, unless `nonfinite` is "ignore"). An error of the disk becomes a warning.

        `best_before`: best metric and its step before this step's evaluation, for when the new best cannot be saved.
        """
        step, is_waited_for = state.global_step, True
        if not self._are_weights_finite(step):
            yield None
            return
        before = (*best_before, state.best_model_checkpoint) if best_before else None
        save = Save(os.path.join(run_dir, checkpoint_name(step)), step, state.epoch, state, before, self.run)
        self._current = save
        try:
            yield save
            is_waited_for = self.asynchronous is None or not self.asynchronous.in_flight
        except Exception as error:
            if not self._is_tolerated(error, save):
                raise
        finally:
            self._current = None
        if not is_waited_for:
            self._in_flight = save
        elif not save.has_failed:
            if save.is_staged:
                note(save.directory, save.run)
            self._finished.append(save)

    @property
    def is_making_one(self) -> bool:
        """Whether the checkpoint that is being written is one of the loop, not one that somebody asks a hook for."""
        return self._current is not None

    @contextmanager
    def staged(self, final: str, step: int, position: dict[str, Any]) -> Iterator[str]:
        """Yield, in each rank, a hidden directory to write into; it becomes `final` when all of it is durable.

        That is when the block ends, or with `async_save` later: then the block ends when the state is copied. After an
        exception, which is raised in all ranks, `final` is as it was. `position`: see `save.staged`.
        """
        current, background = self._current, self.asynchronous if self._current is not None else None
        stage: Callable[..., AbstractContextManager[str]] = staged
        checked: dict[str, Any] = {}
        if background is not None:
            if self._model is not None and background.checks_weights:
                checked = checkable_tensors(self._model, self._exempt)
            stage = functools.partial(background.staged, to_check=checked)
        num_ranks, frozen = self._strategy.num_processes, self.frozen if self._shares_weights() else None
        writes_parts = self._strategy.writes_parts
        stage = functools.partial(stage, folders=PART_FOLDERS if writes_parts else ())
        stage = functools.partial(stage, final, step=step, world_size=num_ranks, position=position, frozen=frozen)
        with (
            self._strategy.staged(stage) as directory,
            background.part_in(directory, checked) if background is not None and writes_parts else nullcontext(),
        ):
            yield directory
        if background is not None:  # after the last rank has written
            background.begin(self._strategy.gather_objects)
        if current is not None:
            current.is_staged = True

    def _shares_weights(self) -> bool:
        """Whether there are frozen weights that checkpoints may share. Asked before each save, as training may freeze
        some in its course.
        """
        return self._model is None or not all(parameter.requires_grad for parameter in self._model.parameters())

    def _are_weights_finite(self, step: int) -> bool:
        """Reads from the device; NonFiniteError where they are not, unless `nonfinite` is "ignore"."""
        assert self._model is not None
        names: list[str] = []
        if self.asynchronous is None or not self.asynchronous.checks_weights:
            names = nonfinite_tensors(checkable_tensors(self._model, self._exempt))
        flag = float(self._guard.flag()) if self._guard is not None else 0.0
        bad, bad_tensors = self._strategy.mean_of_floats([flag, float(len(names))])
        if self._guard is not None:
            self._guard.check_flag(bad)
        return may_be_saved(names, bool(bad_tensors), step, self._policy)

    def _is_tolerated(self, error: Exception, save: Save) -> bool:
        """Whether the run continues after `error`, which ended `save`."""
        if isinstance(error, NonFiniteWeights):
            save.fail()
            return not may_be_saved(error.names, True, save.step, self._policy)
        if not self.failures.tolerates(error, save.directory, save.step):
            return False
        save.fail()
        return True

    # -- what became of it ---------------------------------------------------------------------------------------------

    def finished(self, wait: bool = False) -> list[Save]:
        """The saves that have become durable since this was last asked, oldest first. `wait`: until none is in flight.

        One that failed is noted, and not among them. Raises SavingFailed, or NonFiniteError for weights that are not
        finite.
        """
        durable, self._finished = self._finished, []
        in_flight = self._in_flight
        if in_flight is None or self.asynchronous is None or not self.asynchronous.is_done(wait):
            return durable
        self._in_flight = None
        try:
            self.asynchronous.finish(self._strategy.first_error)
        except Exception as error:
            if not self._is_tolerated(error, in_flight):
                raise
            return durable
        note(in_flight.directory, in_flight.run)
        return [*durable, in_flight]

    @contextmanager
    def concluding(self, save: Save) -> Iterator[None]:
        """Around what follows a save that is durable, which may fail as the save itself may. Afterwards it is the last
        one, unless it `has_failed`.
        """
        try:
            yield
        except Exception as error:
            if not self._is_tolerated(error, save):
                raise
        else:
            self.failures.num_failures, self.failures.last_saved = 0, save.step
            self.last_checkpoint, self.saved_step = save.directory, save.step

    def delete(self, path: str) -> None:
        """Delete a directory that has lost the name of a checkpoint; by the background writer, where there is one."""
        if self.asynchronous is None or not self.asynchronous.delete(path):
            commit.delete(path)

    def hand_over(self, limit_s: float) -> None:
        """Another thread is about to end the process: what is in flight may be written first, for `limit_s`."""
        if self.asynchronous is not None:
            self.asynchronous.hand_over(limit_s)

    def close(self) -> None:
        """The run is over, however it ended."""
        if self.asynchronous is not None:
            error = sys.exc_info()[1]
            # After an error the other processes may be gone: the writer waits for their parts, not the run.
            has_others = error is not None and self._strategy.writes_parts
            self.asynchronous.close(wait=not has_others and not isinstance(error, KeyboardInterrupt))
            self.asynchronous = self._in_flight = None
        self._finished = []
        self._model = self._guard = None  # `model_init` may need their memory
