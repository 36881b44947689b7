"""A checkpoint that was edited on purpose (weights averaged or converted, a new vocabulary): promised as it is now.

Owns: `accept`. Leaves to others: noticing that a checkpoint has changed (manifest.py), what can be read
(without_manifest.py).
"""

from __future__ import annotations

import os
from typing import Any

from trainwright.checkpoint.commit import flush, flush_directory, flush_parents
from trainwright.checkpoint.json_files import read_loop_state, read_trainer_state
from trainwright.checkpoint.manifest import read_manifest, some_of, write_manifest
from trainwright.checkpoint.paths import DAMAGED, INCOMPLETE_NAME, MODEL_NAMES, step_of
from trainwright.checkpoint.without_manifest import structural_problems
from trainwright.names import LOOP_STATE_NAME, MANIFEST_NAME, TRAINER_STATE_NAME


class Unreadable(ValueError):
    """A checkpoint that cannot be accepted; `reasons` are sentences."""

    def __init__(self, directory: str, reasons: list[str]) -> None:
        super().__init__(f"{directory} cannot be accepted: {'; '.join(reasons)}.")
        self.reasons = reasons


def accept(directory: str | os.PathLike[str]) -> str:
    """Write the manifest of a checkpoint anew, for the files that it holds now; its path.

    One that a resume had set aside as `checkpoint-N.damaged` gets its name back. Raises Unreadable, without any change,
    where a file could not be loaded, weights or trainer state are missing, or the name is in use again.
    """
    path = os.path.abspath(directory)
    final = path.removesuffix(DAMAGED)
    reasons = _reasons_against(path, final)
    if reasons:
        raise Unreadable(path, reasons)
    step, world_size, position = _recorded_position(path)
    write_manifest(path, step, world_size, position, flush=flush)
    flush(os.path.join(path, MANIFEST_NAME))
    flush_directory(path)
    if final != path:
        os.rename(path, final)
        flush_parents(final)
    return final


def _reasons_against(path: str, final: str) -> list[str]:
    if os.path.lexists(os.path.join(path, INCOMPLETE_NAME)):
        return ["copying it into place was never finished"]
    reasons = [r for r in some_of(structural_problems(path)) if not r.startswith(MANIFEST_NAME)]
    weights = sorted(name for name in MODEL_NAMES if os.path.lexists(os.path.join(path, name)))
    if len(weights) > 1:
        reasons.append(f"it holds {' and '.join(weights)}, of which only one would be loaded: remove the others")
    if final != path and os.path.lexists(final):
        reasons.append(f"{final} is there already")
    if not reasons and step_of(final) not in (None, _step_of_state(path)):
        reasons.append(f"{TRAINER_STATE_NAME} belongs to step {_step_of_state(path)}")
    return reasons


def _step_of_state(path: str) -> int:
    step: int = read_trainer_state(os.path.join(path, TRAINER_STATE_NAME))["global_step"]
    return step


def _recorded_position(path: str) -> tuple[int, int, dict[str, Any]]:
    """Step, number of processes and position in the data, from the old manifest where it can still be read."""
    try:
        old = read_manifest(path)
    except ValueError:
        old = None
    if old is not None:
        return _step_of_state(path), old.world_size, old.position
    position: dict[str, Any] = {}
    if os.path.isfile(os.path.join(path, LOOP_STATE_NAME)):
        position = read_loop_state(os.path.join(path, LOOP_STATE_NAME))["position"]
    num_random_states = sum(name.startswith("rng_state_") for name in os.listdir(path))
    return _step_of_state(path), max(1, num_random_states), position
