"""The saves of a run, one after the other, and what becomes of each.

Owns: refusing to save what is not finite, bearing a disk that fails, waiting for a save that is written beside the
training (`async_save`), and remembering the last checkpoint. Leaves to others: what a checkpoint holds and what follows
it (the hooks of Trainer), writing beside the training (asynchronous.py), when to save.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from trainwright.checkpoint import sink
from trainwright.checkpoint.layout import checkpoint_name, sort_checkpoints
from trainwright.checkpoint.paths import is_ours
from trainwright.checkpoint.runs import Record, continued, wrote
from trainwright.checkpoint.save_failures import SaveTrouble, predicted_bytes
from trainwright.checkpoint.weights import check_can_be_held
from trainwright.names import SaveStrategy
from trainwright.nonfinite.guard import NonFiniteGuard
from trainwright.nonfinite.weights import NonFiniteWeights, checkable_tensors, may_be_saved, nonfinite_tensors
from trainwright.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from trainwright.checkpoint.asynchronous import AsyncSaves

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
    """One save of a run, remembered until what became of it is known."""

    directory: str
    step: int
    epoch: float | None
    # Metric, step and directory of the best checkpoint before the evaluation of this step; None: there was none.
    best_before: tuple[Any, Any, Any] | None = None
    run: Record | None = None  # that makes it

    @contextlib.contextmanager
    def moment(self, state: TrainerState) -> Iterator[None]:
        """Within, `state` stands at the step of this save: whoever hears of a checkpoint names it by
        `state.global_step`.
        """
        now = state.global_step, state.epoch
        state.global_step, state.epoch = self.step, self.epoch
        try:
            yield
        finally:
            state.global_step, state.epoch = now

    def forget_best(self, state: TrainerState) -> None:
        """The save failed: where it would have been the best, the best that can be loaded is that of before."""
        is_lost = not wrote(self.run, self.directory)  # what is there may be an earlier run's
        if self.best_before and state.best_global_step == self.step and is_lost:
            state.best_metric, state.best_global_step, state.best_model_checkpoint = self.best_before


class Saves:
    """Makes the saves of a run; `settle` sees to one that is written beside the training.

    `now()` gives the state and the control of the run as they are, `follow(checkpoint)` does what comes after a
    checkpoint is on the disk, `tell(checkpoint)` tells the callbacks. `control.should_save` says whether a save is
    wanted, and is False once it was made.
    """

    def __init__(
        self,
        now: Callable[[], tuple[TrainerState, TrainerControl]],
        follow: Callable[[str], None],
        tell: Callable[[str], None],
    ) -> None:
        self._now, self._follow, self._tell = now, follow, tell
        self.last_checkpoint: str | None = None  # of this run; what a rollback goes back to
        self.run: Record | None = None  # that its checkpoints name as theirs
        self.saved_step = 0  # the last step with nothing to lose: it has a checkpoint, or the run began there
        self.asynchronous: AsyncSaves | None = None  # with `async_save`, while a run may save
        self._to_tell: Save | None = None  # the one in flight

    def begin_run(self, checkpoint: str | None, run_dir: str) -> None:
        """A run begins at `checkpoint` (None: anew), which saves into `run_dir`."""
        self.last_checkpoint = checkpoint
        others = sort_checkpoints(run_dir) if os.path.isdir(run_dir) else []
        self.run = continued(checkpoint, [path for path in others if is_ours(path)])

    def begin(
        self,
        args: Any,
        strategy: Any,
        model: nn.Module,
        optimizer: Any,
        *,
        guard: NonFiniteGuard | None,
        exempt: Container[str],
        trainer_class: str,
        overridden: Sequence[str],
    ) -> None:
        """An attempt at a run begins. Starts the process that writes, where `args.async_save` leaves it something to
        do: `overridden` are those of HOOKS_THAT_WRITE that `trainer_class` has of its own.

        `model`: whose weights are looked at before each save, but for those named in `exempt`.
        """
        self.trouble = SaveTrouble(args.max_save_failures)
        self._policy, self._strategy = args.nonfinite, strategy
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
            predicted_bytes(model, None if args.save_only_model else optimizer)[1],
            is_main=strategy.process_index == 0,
            is_distributed=strategy.is_distributed,
        )

    def make(
        self,
        run_dir: str,
        write: Callable[[], None],
        best_before: tuple[Any, Any] | None,
        watch: Callable[[str, Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        """Write a checkpoint into `run_dir`, unless the weights are not finite or the disk fails, and tell of it.

        `best_before`: best metric and its step before this step's evaluation, for when the new best cannot be saved.
        """
        state, _ = self._now()
        directory = os.path.join(run_dir, checkpoint_name(state.global_step))
        is_worth_it = self._is_worth_saving(state.global_step)
        self._want(is_worth_it)
        if not is_worth_it:
            return
        beside: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.asynchronous is not None:
            watch("saving", self.asynchronous.wait_before)(state.global_step)
            self.settle()
            self._want(True)
            beside = self.asynchronous.beside(self._strategy, self._model, self._exempt)
        before = (*best_before, state.best_model_checkpoint) if best_before else None
        save = Save(directory, state.global_step, state.epoch, before, self.run)
        try:
            with self.trouble.borne(directory, save.step, is_whole=self.asynchronous is None), beside:
                watch("saving", write)()
        except NonFiniteWeights as found:
            return self._refuse(save, found)
        if self.asynchronous is None or not self.asynchronous.in_flight:
            self._is_over(save)
        else:
            self._to_tell = save
            self._want(False)

    @property
    def is_beside(self) -> bool:
        """Whether the save that is being made will be written beside the training."""
        return self.asynchronous is not None and self.asynchronous.is_beside

    def staged(self, directory: str) -> None:
        """All of a checkpoint was given away: it is in flight, or stands in `directory` and is followed up."""
        if self.asynchronous is not None and self.asynchronous.is_beside:
            self.asynchronous.begin()
        else:
            self._follow(directory)

    def settle(self, wait: bool = True) -> None:
        """Where the save in flight is over (`wait`: until it is), see to what follows a save."""
        save = self._to_tell
        if self.asynchronous is None or save is None or not self.asynchronous.is_done(wait):
            return
        state, control = self._now()
        self._to_tell, wants_save = None, control.should_save
        try:
            with self.trouble.borne(save.directory, save.step):
                self.asynchronous.settle(self._strategy.first_error)
                with save.moment(state), sink.deleting(self.asynchronous.delete):
                    self._follow(save.directory)
            self._is_over(save)
        except NonFiniteWeights as found:
            self._refuse(save, found)
        self._want(wants_save or self._now()[1].should_save)

    def drain(self) -> None:
        """An exception ends the run: see the save in flight through. Other processes may be gone, so ask none."""
        if self._to_tell is None or self._strategy.is_distributed:
            return
        try:
            self.settle()
        except Exception as error:
            logger.error("The save in flight failed as well: %s: %s", type(error).__name__, error)

    def close(self) -> None:
        """The run is over, however it ended."""
        if self.asynchronous is not None:
            self.asynchronous.close(wait=not isinstance(sys.exc_info()[1], KeyboardInterrupt))
            self.asynchronous = self._to_tell = None

    def _want(self, should_save: bool) -> None:
        self._now()[1].should_save = should_save

    def _is_over(self, save: Save) -> None:
        """Tell the callbacks of it, or forget a best checkpoint that is not there."""
        state, _ = self._now()
        if self.trouble.num_failures == 0:
            self.last_checkpoint, self.saved_step = save.directory, save.step
            with save.moment(state):
                self._tell(save.directory)
        else:
            self._want(False)  # as telling does: the end of an epoch must not try again
            save.forget_best(state)

    def _refuse(self, save: Save, found: NonFiniteWeights) -> None:
        self._want(False)
        save.forget_best(self._now()[0])
        may_be_saved(found.names, True, save.step, self._policy)

    def _is_worth_saving(self, step: int) -> bool:
        """Whether the weights are finite. Reads from the device; NonFiniteError unless `nonfinite` is "ignore"."""
        names: list[str] = []
        if self.asynchronous is None or not self.asynchronous.checks_weights:
            names = nonfinite_tensors(checkable_tensors(self._model, self._exempt))
        flag = float(self._guard.flag()) if self._guard is not None else 0.0
        bad, bad_tensors = self._strategy.mean_of_floats([flag, float(len(names))])
        if self._guard is not None:
            self._guard.check_flag(bad)
        return may_be_saved(names, bool(bad_tensors), step, self._policy)
