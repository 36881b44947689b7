"""Read back what save.py wrote, and find the checkpoint to resume from.

Owns: verification before loading, the fall-back to an older checkpoint, and errors that say what a missing file costs.
Leaves to others: weights (weights.py), the trainer state (state.py), the order in which a run restores things.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainwright import shards
from trainwright.checkpoint.json_files import read_loop_state
from trainwright.checkpoint.layout import linked_checkpoints, of_earlier_runs, oldest_first, sort_checkpoints
from trainwright.checkpoint.manifest import FROZEN_NOTE, how_to_accept, problems
from trainwright.checkpoint.paths import DAMAGED, is_ours, named, rng_name, shown, step_of
from trainwright.checkpoint.sharded import with_optimizer_parts
from trainwright.checkpoint.state_values import check_fits, check_parameters, check_random_state, check_saved
from trainwright.checkpoint.tensors import load_tensors
from trainwright.names import LOOP_STATE_NAME, OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from trainwright.seeding import RngState

__all__ = [
    "damaged_checkpoints",
    "find_resumable",
    "load_loop_state",
    "load_optimizer",
    "load_rng",
    "load_scaler",
    "load_scheduler",
    "load_tensors",
]

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]

# What torch, NumPy and Python raise for a state that they cannot have.
_STATE_ERRORS = (
    KeyError, TypeError, AttributeError, ValueError, RuntimeError, IndexError, OverflowError, AssertionError
)  # fmt: skip


def damaged_checkpoints(output_dir: Path) -> list[str]:
    """Names of the checkpoints in `output_dir` that earlier looks for one found damaged and set aside."""
    names = [name for name in os.listdir(output_dir) if name.endswith(DAMAGED)]
    return sorted(name for name in names if step_of(name.removesuffix(DAMAGED)) is not None)


def find_resumable(path_or_output_dir: Path, is_explicit: bool) -> str:
    """The checkpoint to resume from, verified byte by byte.

    `is_explicit`: the path is the checkpoint itself; a damaged one raises ValueError with what is wrong and the newest
    good one next to it. Otherwise it is an output directory: its newest good checkpoint (`layout.oldest_first`) is
    returned, each damaged newer one is named in a warning and renamed to `<name>.damaged`. Raises ValueError where none
    is good. Call it in one process and tell the others.
    """
    path = os.fspath(path_or_output_dir)
    if is_explicit:
        found = _obstacles(path)
        if not found:
            return path
        raise ValueError(
            f"The checkpoint {path} cannot be used: {'; '.join(found)}."
            f"{_good_neighbour(path) or ' There is no good checkpoint beside it.' + _remedy(found)}"
            f"{how_to_accept(path) if is_ours(path) else ''}"
        )
    by_step = sort_checkpoints(path) if os.path.isdir(path) else []
    links = linked_checkpoints(path) if os.path.isdir(path) else []
    rejected = [f"{link} is a link, which is followed only where it is named itself" for link in links]
    if links:
        logger.warning("%s: resume_from_checkpoint=%r.", "; ".join(rejected), links[-1])
    for checkpoint in reversed(oldest_first(by_step)):
        found = _obstacles(checkpoint)
        if not found:
            _name_higher_ones(checkpoint, by_step)
            return checkpoint
        rejected.append(f"{checkpoint}: {'; '.join(found)}")
        logger.warning(
            "THE CHECKPOINT %s IS DAMAGED and is not used: %s. Looking for an older one.%s",
            checkpoint,
            "; ".join(found),
            _set_aside(checkpoint),
        )
    if rejected:
        what = "damaged" if by_step else "a link"
        raise ValueError(
            f"Every checkpoint in {path} is {what}, nothing can be resumed. {' '.join(rejected)}{_remedy(rejected)}"
        )
    raise ValueError(
        f"There is no checkpoint in {path} to resume from. Call train() without resume_from_checkpoint to start."
    )


def _obstacles(checkpoint: str) -> list[str]:
    """What keeps a run from being resumed from `checkpoint`, as sentences."""
    found = problems(checkpoint)
    if not found and not os.path.isfile(os.path.join(checkpoint, TRAINER_STATE_NAME)):
        return [f"{TRAINER_STATE_NAME} is missing, so nothing says where the run was"]
    return found


def _name_higher_ones(checkpoint: str, by_step: list[str]) -> None:
    """Say that checkpoints with higher numbers are passed over, because an earlier run wrote them."""
    higher = [p for p in by_step[by_step.index(checkpoint) + 1 :] if is_ours(p) and p in of_earlier_runs(by_step)]
    if higher:
        logger.warning(
            "The run is resumed from %s, the newest of the run that began last in this directory. %s %s written by an "
            "earlier one. To go on from there, name it: resume_from_checkpoint=%r.",
            checkpoint, ", ".join(map(os.path.basename, higher)), "was" if len(higher) == 1 else "were", higher[-1],
        )  # fmt: skip


def load_optimizer(
    directory: Path,
    optimizer: Any,
    device: torch.device | str = "cpu",
    model: torch.nn.Module | None = None,
    *,
    must_be_finite: bool = True,
) -> None:
    """Restore the optimizer from `optimizer.pt`; `device` is where its parameters lie.

    `model`: whose parameters are named in errors. `must_be_finite`: not for a run that lets NaN be. Raises
    FileNotFoundError saying what the loss of the file costs, ValueError when it belongs to another model, or holds what
    the optimizer could not step with.
    """
    costs = "Without it the optimizer would start from nothing and the loss would jump"
    path = _required(directory, OPTIMIZER_NAME, costs)
    # On a CPU the state would stay in the mapped file, and every later step would pay for its pages.
    state = load_tensors(path, mmap=torch.device(device).type != "cpu")
    _check_kind(path, optimizer, state)
    hint = "It was written for other parameters: check the model, its frozen parts and `optim`."
    with _naming(path, optimizer, hint):
        check_saved(optimizer, state)
        state = with_optimizer_parts(directory, optimizer, state)
        optimizer.load_state_dict(shards.divided_state(optimizer, state))
        names = {id(parameter): name for name, parameter in model.named_parameters()} if model is not None else {}
        check_parameters(optimizer, names, must_be_finite=must_be_finite)


def load_scheduler(directory: Path, scheduler: Any) -> None:
    """Restore the learning-rate schedule from `scheduler.pt`; errors as `load_optimizer`."""
    costs = "Without it the learning rate would start again with its warm-up"
    path = _required(directory, SCHEDULER_NAME, costs)
    state = load_tensors(path)
    with _naming(path, scheduler, "It was written for another schedule: check `lr_scheduler_type`."):
        check_fits(scheduler, state)
        scheduler.load_state_dict(state)


def load_scaler(directory: Path, scaler: Any) -> None:
    """Restore the fp16 loss scale from `scaler.pt`. A missing file costs a few skipped steps, so it only warns."""
    path = os.path.join(directory, SCALER_NAME)
    if not os.path.isfile(path):
        logger.warning("%s is missing: the fp16 loss scale starts at its default and a few steps may be skipped.", path)
        return
    state = load_tensors(path)
    with _naming(path, scaler, "It was written for another precision: check `fp16`."):
        check_fits(scaler, state)
        scaler.load_state_dict(state)


def load_rng(directory: Path, rank: int = 0, world_size: int = 1) -> None:
    """Restore this process's random state (Python, NumPy, torch, accelerators). A missing file only warns."""
    path = os.path.join(directory, rng_name(rank, world_size))
    if not os.path.isfile(path):
        logger.warning(
            "%s is missing, perhaps because the number of processes has changed (now %d): dropout, shuffling and "
            "augmentation will differ from those of a run without interruption.",
            path,
            world_size,
        )
        return
    state = load_tensors(path, mmap=False)
    try:
        check_random_state(state)
        RngState.from_state_dict(state).restore(path)
    except _STATE_ERRORS as error:
        raise ValueError(f"{path} holds no random state that fits: {shown(error, 500)}.") from error


def load_loop_state(directory: Path) -> dict[str, Any]:
    """What `save_loop_state` wrote; empty for a checkpoint of another implementation. Raises ValueError if damaged."""
    path = os.path.join(directory, LOOP_STATE_NAME)
    try:
        return read_loop_state(path)
    except FileNotFoundError:
        return {}


def _required(directory: Path, name: str, costs: str) -> str:
    path = os.path.join(directory, name)
    if os.path.isfile(path):
        return path
    if name == OPTIMIZER_NAME and os.path.isfile(os.path.join(directory, "latest")):
        raise FileNotFoundError(
            f"{path} is missing: {os.fspath(directory)} was saved with DeepSpeed, in parts. Resume with deepspeed=, or "
            "start a new run from its weights."
        )
    if not any(os.path.isfile(os.path.join(directory, other)) for other in (OPTIMIZER_NAME, SCHEDULER_NAME)):
        raise FileNotFoundError(
            f"{os.fspath(directory)} was made with save_only_model: cannot be resumed; start from its weights instead "
            f"({OPTIMIZER_NAME} and {SCHEDULER_NAME} are missing)."
        )
    raise FileNotFoundError(f"{path} is missing. {costs}. Resume from an older checkpoint, or start from its weights.")


def _check_kind(path: str, optimizer: Any, state: Any) -> None:
    """Raise ValueError where another optimizer wrote `state`: torch would accept it, and the first step would fail.

    A release may add options to an optimizer, so only both lacking some of the other's is proof.
    """
    now, then = getattr(optimizer, "param_groups", None), state.get("param_groups") if isinstance(state, dict) else None
    if not now or not then:
        return
    if not isinstance(then, list) or not isinstance(then[0], dict):
        raise ValueError(f"{path} is damaged: `param_groups` is no list of groups. Use an older checkpoint.")
    ours, theirs = set(now[0]), set(then[0]) | {"initial_lr"}
    if ours - theirs and theirs - ours - {"initial_lr", "param_names"}:
        only_theirs = named(sorted(map(repr, theirs - ours - {"initial_lr"})))
        raise ValueError(
            f"{path} was written by another optimizer than {type(optimizer).__name__}: it has the options "
            f"{only_theirs} and not {sorted(ours - theirs)}. Check `optim`."
        )


@contextmanager
def _naming(path: str, target: Any, hint: str) -> Iterator[None]:
    """Say of whatever a state makes `target` raise which file it came from."""
    try:
        yield
    except _STATE_ERRORS as error:
        raise ValueError(f"{path} does not fit {type(target).__name__}: {shown(error, 500)}. {hint}") from error


def _set_aside(checkpoint: str) -> str:
    """Rename a damaged checkpoint so that it is neither found nor rotated again; what was done, as a sentence."""
    if not is_ours(checkpoint):
        return " It stays where it is."
    target = checkpoint + DAMAGED
    try:
        if os.path.lexists(target):
            raise FileExistsError(f"{target} exists")
        os.rename(checkpoint, target)
        return f" It is kept as {target}.{how_to_accept(target)}"
    except OSError as error:
        return f" It could not be renamed ({error}) and stays where it is."


def _good_neighbour(path: str) -> str:
    """A sentence naming the newest good checkpoint next to `path`; "" where there is none."""
    parent = os.path.dirname(os.path.abspath(path))
    others = sort_checkpoints(parent) if os.path.isdir(parent) else []
    good = next((c for c in reversed(others) if c != os.path.abspath(path) and is_ours(c) and not _obstacles(c)), None)
    return f" The newest good checkpoint beside it is {good}." if good else ""


def _remedy(sentences: list[str]) -> str:
    """How frozen weights come back where every one of `sentences` names them as damaged; else ""."""
    if not all(FROZEN_NOTE in sentence for sentence in sentences):
        return ""
    return (
        " Frozen weights are those of the original model, which training did not change: train one step with the same "
        "settings and save_frozen_weights='once' into another output_dir, copy the named file from there into the "
        "checkpoint, and look at it with `trainwright check`."
    )
