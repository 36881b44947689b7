"""Where a resumed run goes on, and what a checkpoint remembers of it beside weights and optimizer.

Owns: `loop_state.json`: position in the data, the running loss, the arguments. Leaves to others: `trainer_state.json`
(state), files and verification (checkpoint). Other implementations write no such file; their position is counted in
steps.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from trainwright.callbacks.handler import CallbackHandler
from trainwright.checkpoint import best
from trainwright.checkpoint.layout import get_last_checkpoint, linked_checkpoints, sort_checkpoints
from trainwright.checkpoint.leftovers import clean_up_staging
from trainwright.checkpoint.load import damaged_checkpoints, find_resumable, load_loop_state
from trainwright.checkpoint.paths import named
from trainwright.checkpoint.save import arguments_as_json
from trainwright.names import TRAINER_STATE_NAME
from trainwright.plan import TrainingPlan
from trainwright.state import ExportableState, TrainerControl, TrainerState, exported_states, interval_in_steps
from trainwright.window import LossWindow

logger = logging.getLogger(__name__)

AUTO = "auto"  # resume_from_checkpoint: the newest good checkpoint, or a fresh start where there is none yet


@dataclass
class ResumePoint:
    """Where in the data a run stands, what order and randomness it goes on with, and the losses it has logged."""

    epoch: int = 0  # whole passes over the data that are done
    samples_in_epoch: int = 0  # of the next one, over all processes
    generators: dict[str, Any] | None = None  # as `RngState.to_json` gives them, from the start of this epoch
    collator: Any = None  # states of the collator's own generators, as `collator_rng.states` gives them
    total_loss: float = 0.0  # sum of the losses of all updates that were logged
    last_logged_step: int = 0
    worker_shares: dict[str, Any] | None = None  # of a stream, as `position.WorkerShares.to_dict` gives them
    batch_size: dict[str, Any] | None = None  # found by `auto_find_batch_size`, as `FoundBatchSize.to_save` gives it
    micro_batches: int = 0  # of the next pass that are done, counted as `batching` says
    batching: dict[str, Any] | None = None  # what decides how many micro-batches a pass has, as `batching` gives it
    samples_of_pass: int | None = None  # of the last pass that ended before the length that was announced
    last_update: dict[str, float | None] | None = None  # its "learning_rate" and "grad_norm", as a log line has them
    # The end of an epoch (the event, and what a run logs, evaluates and saves then) is still to come: of the pass
    # before, or of this one, where the run made its last update in it.
    owes_epoch_end: bool = False
    arguments: dict[str, Any] = field(default_factory=dict, compare=False)  # of the run that was saved

    def position(self) -> dict[str, int]:
        """What the manifest holds: where in the data the checkpoint was made."""
        return {"epoch": self.epoch, "samples_in_epoch": self.samples_in_epoch}


def find_checkpoint(wanted: str | bool | os.PathLike[str] | None, output_dir: str, is_main_process: bool) -> str | None:
    """The verified checkpoint to resume from: `wanted` itself, or for True the newest good one in `output_dir`.

    "auto" is True where there is a checkpoint, and None (start anew) where this run has not written one yet: what a job
    that is put back into its queue wants. Process 0 looks and tells the others, which would see it tidy up; all of them
    verify what it found, which may lie on disks of their own.

    Raises ValueError where there is none (but for "auto"), and where all there are, or were, are damaged.
    """
    if wanted is None or wanted is False:
        return None
    if not isinstance(wanted, (str, bool, os.PathLike)):
        raise TypeError(
            f"resume_from_checkpoint={wanted!r} must be a directory, True for the newest checkpoint, or 'auto' for the "
            "newest where there is one."
        )
    if not isinstance(wanted, bool) and wanted != AUTO:
        return find_resumable(wanted, is_explicit=True)
    from trainwright.parallel.broadcast import share

    found: str | None = None
    error: Exception | None = None
    if is_main_process:
        try:
            found = _newest_good(output_dir, may_start=wanted == AUTO)
        except (ValueError, OSError) as caught:
            error = caught
    found, error = share((found, error))
    if error is not None:
        raise error
    return found if is_main_process or found is None else find_resumable(found, is_explicit=True)


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


def read_state(checkpoint: str, run_dir: str) -> TrainerState:
    """The trainer state in `checkpoint`, for a run that saves into `run_dir`.

    Of where its best checkpoint lies only the name is believed.
    """
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    state.best_model_checkpoint = best.resumed(state.best_model_checkpoint, checkpoint, run_dir)
    state.places_of_checkpoints = (run_dir, os.path.dirname(os.path.abspath(checkpoint)))
    return state


def loop_state(
    point: ResumePoint,
    window: LossWindow,
    args: Any,
    run: dict[str, Any] | None = None,
    gather: Callable[[Any], list[Any]] = lambda own: [own],
) -> dict[str, Any]:
    """What `loop_state.json` holds; JSON. Reads the running loss from the device.

    `run`: of `runs.continued`. `gather`: the values of all processes, which call this together. "processes" has what
    each of several holds other than the first.
    """
    own = {"epoch_start_generators": point.generators, "collator_generator": point.collator, "window": window.state()}
    first, *others = gather(own)
    differences = [{}, *({name: value for name, value in other.items() if value != first[name]} for other in others)]
    return {
        **first,
        **({"processes": differences} if others else {}),
        "position": point.position(),
        "micro_batches": point.micro_batches,
        "batching": point.batching,
        "samples_of_pass": point.samples_of_pass,
        "last_update": point.last_update,
        "owes_epoch_end": point.owes_epoch_end,
        "total_loss": point.total_loss,
        "last_logged_step": point.last_logged_step,
        "worker_shares": point.worker_shares,
        "batch_size": point.batch_size,
        "save_only_model": args.save_only_model,
        "run": run,
        "arguments": arguments_as_json(args),
    }


def restore_loop(
    checkpoint: str,
    state: TrainerState,
    window: LossWindow,
    *,
    updates_per_epoch: int,
    samples_per_update: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> ResumePoint:
    """Put this process's part of the running loss back into `window`; return where to go on.

    With another number of processes than the checkpoint's each gets the mean of the parts, so that the mean over the
    processes, which is what a log line shows, is that of all updates since the last one.
    """
    saved = load_loop_state(checkpoint)
    if not saved:  # written by another implementation
        epoch, updates = divmod(state.global_step, updates_per_epoch)
        return ResumePoint(epoch, updates * samples_per_update, last_logged_step=state.global_step)
    processes = [{**saved, **part} for part in saved.get("processes") or [{}]]
    if len(processes) == num_processes:
        saved = processes[process_index]
        window.load_state(saved["window"])
    else:
        parts = [process["window"] for process in processes]
        window.load_state({name: sum(part[name] for part in parts) / len(parts) for name in ("sum", "num_losses")})
    position = saved["position"]
    return ResumePoint(
        position["epoch"],
        position["samples_in_epoch"],
        saved.get("epoch_start_generators"),
        saved.get("collator_generator"),
        saved["total_loss"],
        saved["last_logged_step"],
        saved.get("worker_shares"),
        saved.get("batch_size"),
        saved.get("micro_batches", 0),
        saved.get("batching"),
        saved.get("samples_of_pass"),
        saved.get("last_update"),
        saved.get("owes_epoch_end", False),
        saved.get("arguments") or {},
    )


def batching(samples_per_micro_batch: int, plan: TrainingPlan, args: Any) -> dict[str, Any]:
    """What decides how many micro-batches a pass over the data has; JSON.

    "planned_together": micro-batches that a sampler makes of one lot of samples, so that their number is a multiple.
    """
    accumulation = args.gradient_accumulation_steps
    return {
        "samples_per_micro_batch": samples_per_micro_batch,
        "gradient_accumulation_steps": accumulation,
        "planned_together": accumulation if args.train_sampling_strategy == "batch_rebalance" else 1,
        "micro_batches_per_epoch": plan.len_dataloader,
    }


def micro_batches_done(point: ResumePoint, now: dict[str, Any], plan: TrainingPlan) -> int:
    """How many micro-batches of the epoch lie before `point`.

    `now`: the `batching` of this run. Where it is the checkpoint's, their number is too. Else so many that those after
    them are what the samples that are left give.
    """
    size, together = int(now["samples_per_micro_batch"]), int(now["planned_together"])
    if point.batching == now and point.samples_in_epoch:
        return point.micro_batches
    if plan.len_dataloader is None or point.samples_in_epoch == 0:
        return point.samples_in_epoch // size
    lots, rest = divmod(max(0, plan.num_examples - point.samples_in_epoch), size * together)
    drops_the_rest = plan.len_dataloader * size < plan.num_examples
    num_left = (lots + (rest > 0 and not drops_the_rest)) * together
    return max(0, plan.len_dataloader - num_left)


def plan_from_here(
    plan: TrainingPlan, epoch: int, micro_batches: int, global_step: int, accumulation: int
) -> TrainingPlan:
    """The plan of a run that goes on behind `micro_batches` of `epoch`, after `global_step` updates of any size.

    In epochs, the updates are those that the rest of the data gives; in steps, the epochs are those that it takes to
    make them.
    """
    if plan.len_dataloader is None:
        return plan
    per_epoch = plan.num_update_steps_per_epoch
    # Before this place, in updates of the present size; those left are rounded up, as the last may be a short one.
    done = (epoch + 1) * per_epoch - -(-(plan.len_dataloader - micro_batches) // accumulation)
    if plan.epoch_based:
        return replace(plan, max_steps=plan.max_steps + global_step - done)
    num_left = max(0, plan.max_steps - global_step)
    return replace(plan, num_train_epochs=-(-(done + num_left) // per_epoch))


def say_where(checkpoint: str, point: ResumePoint, state: TrainerState, plan: TrainingPlan, args: Any) -> None:
    """Say from where a run goes on, as a warning, which is what users see by default, or that nothing is left of it."""
    step, name = state.global_step, os.path.basename(os.path.normpath(checkpoint))
    if step < plan.max_steps:
        logger.warning(
            "Resumed from %s: step %d of %d, %d samples into epoch %d.",
            name,
            step,
            plan.max_steps,
            point.samples_in_epoch,
            point.epoch,
        )
        return
    length = f"num_train_epochs={args.num_train_epochs}" if plan.epoch_based else f"max_steps={args.max_steps}"
    logger.warning(
        "There is nothing to train: %s was saved at step %d, and with %s this run ends at step %d. The weights stay as "
        "they were saved, and the training loss is that of the run before. To train further, raise %s; to train from "
        "the start, leave out resume_from_checkpoint and use another output_dir.",
        checkpoint,
        step,
        length,
        plan.max_steps,
        length.partition("=")[0],
    )


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


def exported_callbacks(handler: CallbackHandler, control: TrainerControl) -> dict[str, Any]:
    """The states of the callbacks that have one, and of `control`, for `TrainerState.stateful_callbacks`."""
    return exported_states(item for item in [*handler.callbacks, control] if isinstance(item, ExportableState))


def _warn_of_lost_states(handler: CallbackHandler, saved: dict[str, Any]) -> None:
    """Name the callbacks whose state the checkpoint holds, and that this run has not, or has fewer times."""
    present = [type(item).__name__ for item in handler.callbacks if isinstance(item, ExportableState)]
    lost = []
    for name, states in saved.items():
        count = len(states) if isinstance(states, list) else 1
        if name != TrainerControl.__name__ and present.count(name) < count:
            lost.append(f"{name} ({present.count(name)} of {count})" if count > 1 and name in present else name)
    if lost:
        logger.warning(
            "The checkpoint holds the state of callbacks that this Trainer does not have: %s. Unless they are passed "
            "in callbacks=, they do not run, and checkpoints from here on are without their state.",
            named(lost),
        )


def restore_callbacks(handler: CallbackHandler, saved: dict[str, Any], *, replace: bool) -> None:
    """Give the callbacks the state they had: what they counted (attributes) always; with `replace`
    (`restore_callback_states_from_checkpoint`) also what they were constructed with."""
    _warn_of_lost_states(handler, saved)
    seen: dict[str, int] = {}
    for number, callback in enumerate(handler.callbacks):
        name = type(callback).__name__
        if not isinstance(callback, ExportableState) or name not in saved:
            continue
        states = saved[name] if isinstance(saved[name], list) else [saved[name]]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > len(states):
            continue
        own = states[seen[name] - 1]
        # Only what the callback itself calls its state: a file must not choose which attributes are set.
        known = callback.state().get("attributes", {})
        attributes = {attribute: value for attribute, value in own.get("attributes", {}).items() if attribute in known}
        if replace:
            handler.callbacks[number] = type(callback).from_state({**own, "attributes": attributes})
        else:
            for attribute, value in attributes.items():
                setattr(callback, attribute, value)
    handler.refresh_listeners()
