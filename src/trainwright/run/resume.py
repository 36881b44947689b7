"""Which checkpoint a run is resumed from, and putting what it holds back into the run.

Owns: finding the checkpoint, and restoring, in this order:

1. `restore_weights`, before the data loader is built: the weights (hook `_load_from_checkpoint`), and the batch size
   that fitted;
2. `initial_state`, once the length of the run is known: `trainer_state.json`; then the callbacks (hook
   `_load_callback_state`), then `restore_loop`: the running loss, the position in the data, the generators of the
   collator, the plan of what is left;
3. `restore_optimizer`, once there is one: with the hooks for optimizer, schedule and fp16 scaler; the averaged weights;
4. `restore_generators`, where the first epoch draws its first random number: the random states (hook
   `_load_rng_state`).

The four moments follow from what is built when: a loader needs the batch size, a position the plan, a state the
optimizer, and what is built draws random numbers. Leaves to others: the shape of `loop_state.json` (`loop_state`),
files and their verification (`checkpoint`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from trainwright.callbacks.handler import CallbackHandler, exported_callbacks
from trainwright.checkpoint import best
from trainwright.checkpoint.layout import get_last_checkpoint, linked_checkpoints, newest_of_jobs, sort_checkpoints
from trainwright.checkpoint.leftovers import clean_up_staging
from trainwright.checkpoint.load import damaged_checkpoints, find_resumable
from trainwright.data import collator_rng
from trainwright.names import TRAINER_STATE_NAME, SaveStrategy
from trainwright.oom_retry import FoundBatchSize
from trainwright.plan import TrainingPlan
from trainwright.run import loop_state
from trainwright.run.loop_state import Batching, LoopState, Position
from trainwright.seeding import RngState
from trainwright.state import TrainerControl, TrainerState, interval_in_steps

if TYPE_CHECKING:
    from torch import nn
    from torch.optim.optimizer import Optimizer

    from trainwright.args.training import TrainingArguments
    from trainwright.parallel.strategy import Strategy
    from trainwright.run.run import Run
    from trainwright.techniques.averaging import AveragedWeights

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

AUTO = "auto"  # resume_from_checkpoint: the newest good checkpoint, or a fresh start where there is none yet

# -- the four moments --------------------------------------------------------------------------------------------------


def restore_weights(
    run: Run,
    wanted: str | bool | os.PathLike[str] | None,
    output_dir: str,
    run_dir: str,
    load_weights: Callable[[str], None],
    *,
    is_main_process: bool,
) -> str | None:
    """Find the checkpoint that is `wanted` (see `find_checkpoint`), put its weights into the model, and the batch size
    that fitted into `run`. Returns it, None for a run that starts anew and saves into `run_dir`.
    """
    run.resumes_newest = wanted is True or wanted == AUTO
    checkpoint = find_checkpoint(wanted, output_dir, is_main_process, run.restarted_jobs())
    if checkpoint is not None:
        load_weights(checkpoint)
    elif run.args.save_strategy != SaveStrategy.NO and is_main_process:
        warn_of_another_run(run_dir)
    run.found_size = FoundBatchSize.of_checkpoint(run.args, checkpoint)
    return checkpoint


def initial_state(
    checkpoint: str | None, run_dir: str, handler: CallbackHandler, control: TrainerControl
) -> TrainerState:
    """The state that a run begins with, which saves into `run_dir`: that in `checkpoint`, or a fresh one."""
    if checkpoint is not None:
        return read_state(checkpoint, run_dir)
    state = TrainerState(stateful_callbacks=exported_callbacks(handler, control))
    state.places_of_checkpoints = (run_dir,)
    return state


def read_state(checkpoint: str, run_dir: str) -> TrainerState:
    """The trainer state in `checkpoint`, for a run that saves into `run_dir`.

    Of where its best checkpoint lies only the name is believed.
    """
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    state.best_model_checkpoint = best.resumed(state.best_model_checkpoint, checkpoint, run_dir)
    state.places_of_checkpoints = (run_dir, os.path.dirname(os.path.abspath(checkpoint)))
    return state


def restore_loop(
    run: Run,
    plan: TrainingPlan,
    checkpoint: str | None,
    state: TrainerState,
    strategy: Strategy,
    *,
    samples_per_micro_batch: int,
    collator: Any,
) -> LoopState:
    """Put into `run` what `checkpoint` says of the loop: the running loss, the position in the data and its order, the
    generators of the collator, what is left of `plan`; None: a run that begins. Returns what it says.

    `state`: of the checkpoint. `samples_per_micro_batch`: over all processes.
    """
    args, saved = run.args, loop_state.initial()
    if checkpoint is not None:
        saved = loop_state.read(
            checkpoint,
            run.window,
            global_step=state.global_step,
            updates_per_epoch=plan.num_update_steps_per_epoch,
            samples_per_update=samples_per_micro_batch * args.gradient_accumulation_steps,
            process_index=strategy.process_index,
            num_processes=strategy.num_processes,
        )
        if args.packs or (saved.get("arguments") or {}).get("packing"):
            from trainwright.data.packing_from_args import check_resumed

            check_resumed(args, saved)
    collator_rng.restore(collator, saved.get("collator_generator"))
    is_between_epochs = saved["position"]["samples_in_epoch"] == 0
    if args.ignore_data_skip:
        saved["position"] = {"epoch": saved["position"]["epoch"], "samples_in_epoch": 0}
    now = batching(samples_per_micro_batch, plan, args)
    done = micro_batches_done(saved, now, plan)
    if checkpoint is not None:
        accumulation = args.gradient_accumulation_steps
        plan = plan_from_here(plan, saved["position"]["epoch"], done, state.global_step, accumulation)
        is_over = is_between_epochs or state.global_step == plan.max_steps
        run.owes_epoch_end = bool(saved.get("owes_epoch_end")) and is_over
        if strategy.is_main:
            say_where(checkpoint, saved["position"], state, plan, args)
    run.load_state_dict(saved, plan, now, done)
    return saved


def restore_optimizer(
    checkpoint: str | None,
    args: TrainingArguments,
    model: nn.Module,
    optimizer: Optimizer,
    step: int,
    *hooks: Callable[[str], None],
) -> AveragedWeights | None:
    """Have `hooks` restore optimizer, schedule and fp16 scaler. Returns the average of the weights (`ema_decay`) as it
    is after `step` updates, None without.
    """
    if checkpoint is not None:
        for load in hooks:
            load(checkpoint)
    if args.ema_decay is None:
        return None
    from trainwright.techniques.averaging import begin_average

    return begin_average(args, model, optimizer, checkpoint, step)


@contextlib.contextmanager
def restore_generators(run: Run, checkpoint: str | None, load_rng_state: Callable[[str], None]) -> Iterator[None]:
    """Around the start of an epoch's iterator. A generator state belongs to one moment: at an epoch's start that is
    before the loader draws its base seed, in the middle of an epoch it is after.
    """
    progress = run.progress
    if checkpoint is not None:
        if progress.samples == 0:
            load_rng_state(checkpoint)
        elif progress.generators is not None:
            RngState.from_json(progress.generators).restore()
    progress.generators = RngState.capture().to_json()
    run.is_mid_step = True
    yield
    if checkpoint is not None and progress.samples > 0:
        load_rng_state(checkpoint)
    run.is_mid_step = False


# -- which checkpoint --------------------------------------------------------------------------------------------------


def find_checkpoint(
    wanted: str | bool | os.PathLike[str] | None,
    output_dir: str,
    is_main_process: bool,
    restarted_jobs: Sequence[str] = (),
) -> str | None:
    """The verified checkpoint to resume from: `wanted` itself, or for True the newest good one in `output_dir`.

    "auto" is True where there is a checkpoint, and None (start anew) where this run has not written one yet: what a job
    that is put back into its queue wants. Where an earlier life of one of `restarted_jobs` wrote the newest checkpoint,
    `wanted` is True whatever it says. Rank 0 looks, removes what is half-written and tells the other ranks; all of them
    verify what it found, which may lie on their local disks.

    Raises ValueError where there is none (but for "auto"), and where all there are, or were, are damaged.
    """
    if not isinstance(wanted, (str, bool, os.PathLike, NoneType)):
        raise TypeError(
            f"resume_from_checkpoint={wanted!r} must be a directory, True for the newest checkpoint, or 'auto' for the "
            "newest where there is one."
        )
    if restarted_jobs:
        look = functools.partial(_is_of_earlier_life, output_dir, restarted_jobs)
        wanted = True if _from_rank_0(look, is_main_process) else wanted
    if wanted is None or wanted is False:
        return None
    if not isinstance(wanted, bool) and wanted != AUTO:
        return find_resumable(wanted, is_explicit=True)
    found = _from_rank_0(functools.partial(_newest_good, output_dir, may_start=wanted == AUTO), is_main_process)
    return found if is_main_process or found is None else find_resumable(found, is_explicit=True)


def _from_rank_0(look: Callable[[], Found], is_main_process: bool) -> Found:
    """What `look()` returned, or the error that it raised, in rank 0: in all ranks."""
    from trainwright.parallel.broadcast import share

    found: Found | None = None
    error: Exception | None = None
    if is_main_process:
        try:
            found = look()
        except (ValueError, OSError) as caught:
            error = caught
    found, error = share((found, error))
    if error is not None:
        raise error
    return found  # type: ignore[return-value]


def _is_of_earlier_life(output_dir: str, jobs: Sequence[str]) -> bool:
    """Whether the newest checkpoint in `output_dir` is that of one of `jobs` before they were restarted."""
    if not os.path.isdir(output_dir):
        return False
    clean_up_staging(output_dir)
    newest = newest_of_jobs(sort_checkpoints(output_dir), jobs)
    if newest is not None:
        logger.warning(
            "The processes were restarted: the run is resumed from the newest good checkpoint in %s.", output_dir
        )
    return newest is not None


def _newest_good(output_dir: str, *, may_start: bool) -> str | None:
    if os.path.isdir(output_dir):
        clean_up_staging(output_dir)  # what a killed run left half-written
    if may_start and not (
        os.path.isdir(output_dir) and (sort_checkpoints(output_dir) or linked_checkpoints(output_dir))
    ):
        damaged = damaged_checkpoints(output_dir) if os.path.isdir(output_dir) else []
        if damaged:
            raise ValueError(
                f"Every checkpoint in {output_dir} is damaged ({', '.join(damaged)}), nothing can be resumed. To start "
                "anew, move them away, or leave out resume_from_checkpoint."
            )
        logger.info("There is no checkpoint in %s yet: the run starts.", output_dir)
        return None
    return find_resumable(output_dir, is_explicit=False)


def warn_of_another_run(output_dir: str) -> None:
    """Say that a run which starts anew finds the checkpoints of another one in its place."""
    last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if last is not None:
        logger.warning(
            "This run starts anew, but %s holds checkpoints of another one (up to %s). One of the same number is "
            "replaced, and save_total_limit counts all of them and deletes those of earlier runs first. Pass "
            "resume_from_checkpoint=True to go on from there, or another output_dir.",
            output_dir,
            os.path.basename(last),
        )


# -- where in the data, and how much is left ---------------------------------------------------------------------------


def batching(samples_per_micro_batch: int, plan: TrainingPlan, args: TrainingArguments) -> Batching:
    """What decides how many micro-batches a pass over the data has; `samples_per_micro_batch` over all processes."""
    accumulation = args.gradient_accumulation_steps
    return {
        "samples_per_micro_batch": samples_per_micro_batch,
        "gradient_accumulation_steps": accumulation,
        "planned_together": accumulation if args.train_sampling_strategy == "batch_rebalance" else 1,
        "micro_batches_per_epoch": plan.len_dataloader,
    }


def micro_batches_done(saved: LoopState, now: Batching, plan: TrainingPlan) -> int:
    """How many micro-batches of the epoch lie before the position of `saved`.

    `now`: the `batching` of this run. Where it is the checkpoint's, their number is too. Else so many that those after
    them are what the samples that are left give.
    """
    size, together = now["samples_per_micro_batch"], now["planned_together"]
    samples = saved["position"]["samples_in_epoch"]
    if samples and "micro_batches" in saved and saved.get("batching") == now:
        return saved["micro_batches"]
    if plan.len_dataloader is None or samples == 0:
        return samples // size
    lots, rest = divmod(max(0, plan.num_examples - samples), size * together)
    drops_the_rest = plan.len_dataloader * size < plan.num_examples
    num_left = (lots + (rest > 0 and not drops_the_rest)) * together
    return max(0, plan.len_dataloader - num_left)


def plan_from_here(
    plan: TrainingPlan, epoch: int, micro_batches: int, global_step: int, accumulation: int
) -> TrainingPlan:
    """The plan of a run that is resumed behind `micro_batches` of `epoch`, after `global_step` updates of any size.

    In epochs, the updates are those that the rest of the data gives; in steps, the epochs are those that it takes to
    make them.
    """
    if plan.len_dataloader is None:
        return plan
    per_epoch = plan.num_update_steps_per_epoch
    # Before this place, in updates of the present size; those left are rounded up, as the last may be a short one.
    done = (epoch + 1) * per_epoch - -(-(plan.len_dataloader - micro_batches) // accumulation)
    if plan.epoch_based:
        return plan._replace(max_steps=global_step + max(0, plan.max_steps - done))
    num_left = max(0, plan.max_steps - global_step)
    return plan._replace(num_train_epochs=-(-(done + num_left) // per_epoch))


def say_where(
    checkpoint: str, position: Position, state: TrainerState, plan: TrainingPlan, args: TrainingArguments
) -> None:
    """Say where a run is resumed, as a warning, which is what users see by default, or that nothing is left of it."""
    step, name = state.global_step, os.path.basename(os.path.normpath(checkpoint))
    if step < plan.max_steps:
        logger.warning(
            "Resumed from %s: step %d of %d, %d samples into epoch %d.",
            name,
            step,
            plan.max_steps,
            position["samples_in_epoch"],
            position["epoch"],
        )
        return
    length = f"num_train_epochs={args.num_train_epochs}" if plan.epoch_based else f"max_steps={args.max_steps}"
    logger.warning(
        "There is nothing to train: %s was saved at step %d, and with %s this run ends at step %d. The weights stay as "
        "they were saved, and the training loss is that of the run before. To train further, raise %s; to train from "
        "the start, use another output_dir (and no resume_from_checkpoint that names this one).",
        checkpoint,
        step,
        length,
        plan.max_steps,
        length.partition("=")[0],
    )


# -- settings ----------------------------------------------------------------------------------------------------------


def report_changes(args: Any, state: TrainerState, train_batch_size: int) -> None:
    """Warn of intervals and batch sizes that differ from the checkpoint's, by argument. The new ones are used: changing
    them is what the user asked for.

    Args:
        args: of the run that begins.
        state: of the checkpoint.
        train_batch_size: samples per micro-batch and process of the run that begins.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for name in ("logging_steps", "eval_steps", "save_steps"):
        now = getattr(args, name)
        if now is not None and (now >= 1 or state.max_steps > 0):
            # A share of the run is compared in steps of the run that was saved.
            changed[name] = (interval_in_steps(now, state.max_steps), getattr(state, name))
    if state.train_batch_size is not None:
        num_devices = max(1, args.n_gpu)
        changed["per_device_train_batch_size"] = (train_batch_size / num_devices, state.train_batch_size / num_devices)
    lines = [
        f"\t{name}: {_plain(now)} (from args) != {_plain(then)} (from {TRAINER_STATE_NAME})"
        for name, (now, then) in changed.items()
        if now != then
    ]
    if lines:
        logger.warning(
            "These settings are not those of the checkpoint; those of the arguments are used from here on:\n%s",
            "\n".join(lines),
        )


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
