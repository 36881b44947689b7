"""DeepSpeed's files in a checkpoint: one part per process, read back by as many processes or by another number.

Owns: writing them into the staged directory, reading them, and the detour over DeepSpeed's universal format where the
number of processes differs. Leaves to others: the engine (`deepspeed.py`), everything else in a checkpoint.

    checkpoint-8/latest                       the name of the next
    checkpoint-8/global_step8/                mp_rank_00_model_states.pt, *zero_pp_rank_<rank>_*_optim_states.pt
    checkpoint-8/zero_to_fp32.py              DeepSpeed's own converter to whole weights

DeepSpeed reads them with pickle. They are read only after the manifest has confirmed every byte, and only if they name
no classes but those that torch reads by itself and the few in ALLOWED.
"""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from trainwright.names import some

logger = logging.getLogger(__name__)

LATEST = "latest"
# The classes in what DeepSpeed 0.19 writes, beyond those that torch reads by itself: records of settings, no functions.
ALLOWED = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


def is_there(checkpoint: str) -> bool:
    """Whether DeepSpeed wrote its part of `checkpoint`."""
    return _tag_of(checkpoint) is not None


def save(engine: Any, directory: str, step: int) -> None:
    """Write the part of each process into `directory`. All processes call it."""
    from deepspeed.checkpoint import constants

    # Without it the converter refuses what stage 1 and 2 wrote, when another number of processes needs it.
    info = {
        constants.UNIVERSAL_CHECKPOINT_INFO: {
            constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE
        }
    }
    engine.save_checkpoint(directory, tag=f"global_step{step}", client_state=info)


def load(engine: Any, checkpoint: str, *, stage: int, work_dir: str, barrier: Callable[[], None]) -> None:
    """Put weights and optimizer state of `checkpoint` into the engine. All processes call it.

    With another number of processes than wrote it, process 0 rewrites it into `work_dir`, in which there must be room
    for it. Raises ValueError for a checkpoint of another engine or stage, or with objects of foreign classes.
    """
    tag = _tag_of(checkpoint)
    if tag is None:
        raise ValueError(
            f"{checkpoint} was not saved with DeepSpeed, so it has no optimizer state for this engine. Resume without "
            "deepspeed, or start a new run from its weights: from_pretrained(checkpoint)."
        )
    folder = os.path.join(checkpoint, tag)
    parts = sorted(glob.glob(os.path.join(glob.escape(folder), "*_optim_states.pt")))
    _check_objects([*parts, *glob.glob(os.path.join(glob.escape(folder), "*_model_states.pt"))])
    saved_stage = _stage_of(parts[0])
    if (saved_stage == 3) != (stage == 3):
        raise ValueError(
            f"{checkpoint} was saved with ZeRO stage {saved_stage}, and this run has stage {stage}, which lays weights "
            f"out in another way. Resume with stage {saved_stage}."
        )
    if len(parts) == torch.distributed.get_world_size():
        engine.load_checkpoint(checkpoint, tag=tag, load_lr_scheduler_states=False)
        return
    logger.info("%s was saved by %s processes, and is rewritten for this number.", checkpoint, len(parts))
    universal = os.path.join(work_dir, f".{os.path.basename(os.path.abspath(checkpoint))}.universal")
    rank, error = torch.distributed.get_rank(), None
    if rank == 0:
        try:
            _rewrite(folder, os.path.join(universal, tag))
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
    errors: list[Any] = [error]
    torch.distributed.broadcast_object_list(errors, src=0)
    try:
        if errors[0] is not None:
            raise ValueError(
                f"{checkpoint} was saved by {len(parts)} processes and cannot be rewritten for "
                f"{torch.distributed.get_world_size()}: {errors[0]}. DeepSpeed does that for Adam and its relatives "
                f"only. Resume with {len(parts)} processes."
            )
        _load_universal(engine, universal, tag, parts[0])
        barrier()  # all have read it
    finally:
        if rank == 0:
            shutil.rmtree(universal, ignore_errors=True)


def _rewrite(folder: str, target: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(os.path.dirname(target), ignore_errors=True)
    os.makedirs(target)
    settings = Namespace(
        input_folder=folder,
        output_folder=target,
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)


def _load_universal(engine: Any, universal: str, tag: str, part: str) -> None:
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(universal, tag=tag, load_lr_scheduler_states=False)
    finally:
        engine._config.load_universal_checkpoint = False
    # With stage 3 DeepSpeed gives every group the settings of the first (weight decay would come over biases), and all
    # groups one count of steps, which each of them then raises.
    optimizer = engine.basic_optimizer
    for group, saved in zip(optimizer.param_groups, _groups_of(part), strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _groups_of(part: str) -> list[dict[str, Any]]:
    """The settings of each parameter group, as one process wrote them."""
    state = torch.load(part, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
    inner = state["optimizer_state_dict"] if "optimizer_state_dict" in state else state["base_optimizer_state"]
    return list(inner["param_groups"])


def _stage_of(part: str) -> int:
    state = torch.load(part, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
    return int(state["zero_stage"])


def _check_objects(paths: list[str]) -> None:
    for path in paths:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # looks, and loads nothing
        foreign = sorted(set(named) - ALLOWED)
        if foreign:
            raise ValueError(
                f"{path} holds objects that DeepSpeed 0.19 does not write, and was not loaded: {some(foreign, 5)}."
            )


def _tag_of(checkpoint: str) -> str | None:
    try:
        with open(os.path.join(checkpoint, LATEST), encoding="utf-8") as file:
            tag = file.read(200).strip()
    except OSError:
        return None
    is_plain = re.fullmatch(r"global_step\d+", tag) is not None
    return tag if is_plain and os.path.isdir(os.path.join(checkpoint, tag)) else None
