"""The files of a trained model, for trackers that upload them.

Owns: which files of a checkpoint are the model, and writing a model where no checkpoint holds it. Leaves to others:
where they are sent (each tracker), checkpoints themselves (`checkpoint/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.names import (
    CHECKPOINT_PREFIX,
    LOOP_STATE_NAME,
    MANIFEST_NAME,
    OPTIMIZER_NAME,
    SAFE_WEIGHTS_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from trainwright.state import TrainerState

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

# Needed to resume training, not to use the model; the optimizer alone is twice as large as the weights.
_FOR_RESUMING = {
    LOOP_STATE_NAME, MANIFEST_NAME, OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME,
}  # fmt: skip


def model_files(directory: Path) -> list[Path]:
    """The files directly in `directory` that make up the model, sorted by name."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file()
        and not path.is_symlink()
        and path.name not in _FOR_RESUMING
        and not path.name.startswith("rng_state")
    )


def trained_model_directory(
    args: TrainingArguments, state: TrainerState, model: nn.Module | None, scratch: Path, processing_class: Any
) -> Path:
    """A directory that holds the trained model.

    That is the best checkpoint with `load_best_model_at_end`, unless it is gone or damaged, so that it was not loaded
    either; without it the checkpoint of the last step; else `scratch`, into which the model is written. A sharded model
    cannot be written by one process alone: then a checkpoint must exist.
    """
    directory = Path(str(args.output_dir)) / f"{CHECKPOINT_PREFIX}-{state.global_step}"
    if getattr(args, "load_best_model_at_end", False) and state.best_model_checkpoint:
        best = best_directory(args, state, then="the model in memory is uploaded")
        if best is not None:
            return best
    elif directory.is_dir() and not directory.is_symlink():
        return directory
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise RuntimeError(
            f"The model is sharded over processes and {directory} does not exist, so there is no file to upload. "
            "Let the run save at its last step (save_strategy='epoch', or save_steps that divide the number of steps)."
        )
    write_model(model, scratch, processing_class)
    return scratch


def best_directory(args: TrainingArguments, state: TrainerState, then: str) -> Path | None:
    """The best checkpoint, verified byte by byte, or None, with a warning that ends in `then`.

    The state may come from another user's file: only a checkpoint in a directory of this run is ever sent.
    """
    # Imported on use: reading checkpoints is not needed to begin a run with a tracker.
    from trainwright.checkpoint.best import undamaged

    directories = (str(args.output_dir), *state.places_of_checkpoints)
    path = undamaged(state.best_model_checkpoint, *directories, then=then)
    return Path(path) if path is not None else None


def write_model(model: nn.Module | None, directory: Path, processing_class: Any = None) -> None:
    """Write weights and, for models with `save_pretrained`, their configuration into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    found: Any = model
    if hasattr(found, "save_pretrained"):
        found.save_pretrained(directory)
    else:
        from safetensors.torch import save_model

        save_model(found, str(directory / SAFE_WEIGHTS_NAME))
    if hasattr(processing_class, "save_pretrained"):
        processing_class.save_pretrained(directory)
