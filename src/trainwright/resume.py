"""Where a resumed run goes on, and what a checkpoint remembers of it beside weights and optimizer.

Owns: `loop_state.json`: position in the data, the running loss, the arguments. Leaves to others: `trainer_state.json`
(state), files and verification (checkpoint). Other implementations write no such file; their position is counted in
steps.
"""

from __future__ import annotations

import base64
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from trainwright.callbacks.handler import CallbackHandler
from trainwright.checkpoint.layout import clean_up_staging, get_last_checkpoint
from trainwright.checkpoint.load import find_resumable, load_loop_state
from trainwright.plan import TrainingPlan
from trainwright.state import ExportableState, TrainerControl, TrainerState, exported_states
from trainwright.window import LossWindow

logger = logging.getLogger(__name__)


@dataclass
class ResumePoint:
    """Where in the data a run stands, what order and randomness it goes on with, and the losses it has logged."""

    epoch: int = 0  # whole passes over the data that are done
    samples_in_epoch: int = 0  # of the next one, over all processes
    generators: dict[str, Any] | None = None  # as `seeding.generator_states` gives them, from the start of this epoch
    collator: str | None = None  # state of the collator's own generator, where it has one
    total_loss: float = 0.0  # sum of the losses of all updates that were logged
    last_logged_step: int = 0
    arguments: dict[str, Any] = field(default_factory=dict, compare=False)  # of the run that was saved

    def position(self) -> dict[str, int]:
        """What the manifest holds: where in the data the checkpoint was made."""
        return {"epoch": self.epoch, "samples_in_epoch": self.samples_in_epoch}


def find_checkpoint(wanted: str | bool | os.PathLike[str] | None, output_dir: str, is_main_process: bool) -> str | None:
    """The verified checkpoint to resume from: `wanted` itself, or for True the newest good one in `output_dir`."""
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        if is_main_process and os.path.isdir(output_dir):
            clean_up_staging(output_dir)  # what a killed run left half-written
        return find_resumable(output_dir, is_explicit=False)
    if not isinstance(wanted, (str, os.PathLike)):
        raise TypeError(f"resume_from_checkpoint={wanted!r} must be a directory, or True for the newest checkpoint.")
    return find_resumable(wanted, is_explicit=True)


def warn_of_another_run(output_dir: str) -> None:
    """Say that a run which starts anew finds the checkpoints of another one in its place."""
    last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if last is not None:
        logger.warning(
            "This run starts anew, but %s holds checkpoints of another one (up to %s). Resuming later would "
            "take the newest "
            "by number, and save_total_limit would delete the lowest. Pass resume_from_checkpoint=True to go "
            "on from it, "
            "or another output_dir.",
            output_dir,
            os.path.basename(last),
        )


def loop_state(point: ResumePoint, window: LossWindow, args: Any) -> dict[str, Any]:
    """What `loop_state.json` holds; JSON. Reads the running loss from the device."""
    return {
        "position": point.position(),
        "epoch_start_generators": point.generators,
        "collator_generator": point.collator,
        "window": window.state(),
        "total_loss": point.total_loss,
        "last_logged_step": point.last_logged_step,
        "save_only_model": args.save_only_model,
        "arguments": args.to_dict(),
    }


def restore_loop(
    checkpoint: str, state: TrainerState, window: LossWindow, *, updates_per_epoch: int, samples_per_update: int
) -> ResumePoint:
    """Put the running loss back into `window`; return where to go on."""
    saved = load_loop_state(checkpoint)
    if not saved:  # written by another implementation
        epoch, updates = divmod(state.global_step, updates_per_epoch)
        return ResumePoint(epoch, updates * samples_per_update, last_logged_step=state.global_step)
    window.load_state(saved["window"])
    position = saved["position"]
    return ResumePoint(
        position["epoch"],
        position["samples_in_epoch"],
        saved.get("epoch_start_generators"),
        saved.get("collator_generator"),
        saved["total_loss"],
        saved["last_logged_step"],
        saved.get("arguments") or {},
    )


def collator_state(collator: Any) -> str | None:
    """The state of a collator's own generator (random masking with a seed) as text; None where it has none."""
    generator = getattr(collator, "generator", None)
    if not isinstance(generator, torch.Generator):
        return None
    return base64.b64encode(generator.get_state().numpy().tobytes()).decode("ascii")


def restore_collator(collator: Any, state: str | None) -> None:
    """Put back what `collator_state` returned. A collator makes its generator at its first batch; here that is now."""
    if state is None:
        return
    generator = getattr(collator, "generator", None)
    if not isinstance(generator, torch.Generator):
        generator = collator.generator = torch.Generator()
    generator.set_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))


def micro_batches_done(samples_in_epoch: int, samples_per_micro_batch: int, plan: TrainingPlan) -> int:
    """How many of an epoch's micro-batches lie before `samples_in_epoch`, so that those after it reach its end."""
    if plan.len_dataloader is None or samples_in_epoch == 0:
        return samples_in_epoch // samples_per_micro_batch
    num_left = -(-max(0, plan.num_examples - samples_in_epoch) // samples_per_micro_batch)
    return max(0, plan.len_dataloader - num_left)


def report_changes(args: Any, state: TrainerState, train_batch_size: int) -> None:
    """Say which settings differ from the checkpoint's. The new ones are used: changing them is what the user
    asked for.
    """
    for name in ("logging_steps", "eval_steps", "save_steps"):
        now, then = getattr(args, name), getattr(state, name)
        if now is not None and now >= 1 and now != then:
            logger.info("%s was %s in the checkpoint and is %s from here on.", name, then, now)
    if state.train_batch_size is not None and state.train_batch_size != train_batch_size:
        logger.warning(
            "The micro-batch was %s samples in the checkpoint and is %s from here on; no sample is skipped or "
            "repeated.",
            state.train_batch_size,
            train_batch_size,
        )


def exported_callbacks(handler: CallbackHandler, control: TrainerControl) -> dict[str, Any]:
    """The states of the callbacks that have one, and of `control`, for `TrainerState.stateful_callbacks`."""
    return exported_states(item for item in [*handler.callbacks, control] if isinstance(item, ExportableState))


def restore_callbacks(handler: CallbackHandler, saved: dict[str, Any], *, replace: bool) -> None:
    """Give the callbacks the state they had: what they counted (attributes) always; with `replace`
    (`restore_callback_states_from_checkpoint`) also what they were constructed with."""
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
        if replace:
            handler.callbacks[number] = type(callback).from_state(own)
        else:
            # Only what the callback itself calls its state: a file must not choose which attributes are set.
            known = callback.state().get("attributes", {})
            for attribute, value in own.get("attributes", {}).items():
                if attribute in known:
                    setattr(callback, attribute, value)
    handler.refresh_listeners()
