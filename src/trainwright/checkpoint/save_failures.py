"""A disk that fails while a checkpoint is saved, and whether one will fit before the first step.

Owns: telling a failing disk from a mistake in code, how many lost checkpoints in a row are tolerated, the predicted
size. Leaves to others: removing what was staged (save.py), when to save.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainwright.checkpoint.commit import remove
from trainwright.checkpoint.layout import sort_checkpoints
from trainwright.checkpoint.paths import INCOMPLETE_NAME, is_ours
from trainwright.interop.loaded import is_peft_model
from trainwright.names import SaveStrategy
from trainwright.nested import strided_parts
from trainwright.shards import local_part

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer

    from trainwright.args.training import TrainingArguments
    from trainwright.state import TrainerState

logger = logging.getLogger(__name__)

_REMEDIES = {
    errno.ENOSPC: "Free space there, or set save_total_limit.",
    errno.EDQUOT: "Your quota is used up: delete what is not needed, or ask for more.",
    errno.EROFS: "The file system is read-only, often after an error of the disk: have it checked and mounted again.",
    errno.EIO: "The disk or the connection to it fails: look into the system's log.",
    errno.EFBIG: "A file is larger than the file system, or the limit of this process (ulimit -f), allows.",
    errno.ENOMEM: "The system had no memory for it: look what else uses it.",
    errno.EMFILE: "This process has too many open files: raise its limit (ulimit -n), or look what keeps them open.",
    errno.ENFILE: "The system has too many open files.",
}
_OF_MOUNTS = "The mount seems to be gone or changed: bring it back."
# What else a mount that vanished answers, or one that came back with other rights. The latter may also be a mistake in
# code that was called, so there the path must be ours.
_BY_NAME = ("ENXIO", "ENOTCONN", "ESTALE", "EREMOTEIO", "ETIMEDOUT", "EHOSTDOWN")
_ALWAYS = frozenset(_REMEDIES) | {getattr(errno, name) for name in _BY_NAME if hasattr(errno, name)}
_WHERE_WE_WRITE = frozenset((errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENODEV))
# Writers in C++ and Rust raise their own types. safetensors names the number, in two ways. torch's zip writer names its
# source file, but what it writes while it is closed fails in the C++ stream, which says no more than that.
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")
_TORCH_WRITER = re.compile(
    r"inline_container\.cc|PytorchStreamWriter|Parent directory .* does not exist|basic_ios::|ios_base::|iostream error"
)
# Of a write that came back short, NumPy and Rust tell no number.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written|failed to write whole buffer")

# Numbers that an optimizer keeps for each of a parameter's, before options that add one.
_STATE_PER_PARAMETER = {
    **dict.fromkeys(("adam", "adamw", "nadam", "radam", "adamax", "adadelta", "rprop"), 2),
    **dict.fromkeys(("adagrad", "rmsprop", "asgd", "lion", "muon"), 1),
    **dict.fromkeys(("sgd", "adafactor"), 0),
}


class SavingFailed(RuntimeError):
    """Too many checkpoints in a row could not be written."""


def disk_errno(error: BaseException, run_dir: str) -> int | None:
    """The number of the system's error behind `error` (EIO where a library hides it); None where it is none of a disk.

    Looks at what it was raised from as well. `run_dir`: where checkpoints are written.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, FileExistsError):  # something that is not ours is in the way, whatever showed it
            return None
        text = str(current)
        named = _OS_ERROR.search(text)
        number = int(named[1] or named[2]) if named else current.errno if isinstance(current, OSError) else None
        if number is None and _SHORT_WRITE.search(text):
            number = errno.ENOSPC
        if isinstance(current, RuntimeError) and _TORCH_WRITER.search(text):
            # Only opening names a reason; a write that fails is found by its position in the file.
            known = {os.strerror(number): number for number in _ALWAYS | _WHERE_WE_WRITE}
            number = next((number for reason, number in known.items() if reason in text), errno.EIO)
        if number in _ALWAYS or (number in _WHERE_WE_WRITE and run_dir in text):
            return number
        current = current.__cause__ or current.__context__
    return None


class SaveFailures:
    """How many checkpoints in a row were lost to the disk; the run tolerates fewer than `max_failures`."""

    def __init__(self, max_failures: int) -> None:
        self.max_failures = max_failures
        self.num_failures = 0
        self.last_saved: int | None = None  # step of the newest checkpoint of this run

    def tolerates(self, error: Exception, directory: str, step: int) -> bool:
        """Whether `error`, of the save into `directory`, is one of the disk; it is counted, and becomes a warning.

        Raises SavingFailed at the last of `max_failures` in a row. A save that succeeds sets `num_failures` to 0.
        """
        number = disk_errno(error, os.path.dirname(os.path.abspath(directory)))
        if number is None:
            return False
        self.num_failures += 1
        if os.path.lexists(os.path.join(directory, INCOMPLETE_NAME)):  # copied halfway, where rename is missing
            remove(directory)
        remedy = _REMEDIES.get(number, _OF_MOUNTS)
        last = f"step {self.last_saved}" if self.last_saved is not None else "before this run, if there is one"
        reason = str(error) if isinstance(error, OSError) else f"{os.strerror(number)}: {error}"
        what = "could not be saved"
        if os.path.lexists(directory):
            what = "was written, but confirming it or deleting older ones failed"
        message = f"The checkpoint of step {step} {what} in {directory}: {reason}."
        if self.num_failures >= self.max_failures:
            raise SavingFailed(
                f"{message} That is {self.num_failures} in a row (max_save_failures={self.max_failures}), so the run "
                f"stops: it would only go on losing work. The newest checkpoint is that of {last}. {remedy} Then train "
                "with resume_from_checkpoint=True."
            ) from error
        logger.warning(
            "%s TRAINING GOES ON; older checkpoints are as they were, the newest is that of %s. A crash before the "
            "next save loses all steps since. Failure %d of at most %d in a row. %s",
            message, last, self.num_failures, self.max_failures, remedy,
        )  # fmt: skip
        return True


def _itself(tensor: Any) -> Any:
    return tensor


def predicted_bytes(model: nn.Module, optimizer: Optimizer | None = None, *, of_part: bool = False) -> tuple[int, int]:
    """(surely, probably) the size of a checkpoint: weights, and what `optimizer` (None: not saved) keeps. `of_part`:
    the size of this process's part of it.

    A state that exists is measured. Else it is what the optimizer is known to keep per parameter; of an unknown one it
    is surely nothing and probably two numbers.
    """
    own: Callable[[Any], Any] = local_part if of_part else _itself
    found = [own(tensor) for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)]
    tensors = {part.data_ptr(): part for tensor in found for part in strided_parts(tensor)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_training = sum(own(parameter).nbytes for parameter in trainable)
    weights = of_training if is_peft_model(model) else sum(tensor.nbytes for tensor in tensors.values())
    if optimizer is None:
        return weights, weights
    kept = sum(
        own(value).nbytes
        for state in optimizer.state.values()
        for value in (state.values() if isinstance(state, dict) else ())
        if isinstance(value, torch.Tensor)
    )
    if kept:
        return weights + kept, weights + kept
    known = _STATE_PER_PARAMETER.get(type(optimizer).__name__.lower())
    if known is None:
        return weights, weights + 2 * of_training
    settings = getattr(optimizer, "defaults", {})
    known += (
        bool(settings.get("amsgrad")) + bool(settings.get("momentum") and known < 2) + bool(settings.get("centered"))
    )
    return weights + known * of_training, weights + known * of_training


def check_free_space(
    output_dir: str, size_bytes: tuple[int, int], num_saves: int | None, limit: int | None, num_bytes_shared: int = 0
) -> None:
    """Before the first step: warn where `output_dir` has no room for the checkpoints to come, of `predicted_bytes`.

    `num_saves`: how many the run will make (None: unknown), of which `limit` stay, with one more while a new one is
    written. `num_bytes_shared` of each are those of the first (frozen.py). Raises OSError where not even one fits.
    Where the system names no free space, nothing is checked.
    """
    surely, probably = size_bytes
    if num_saves == 0:
        return
    try:
        total, _, free = shutil.disk_usage(output_dir)
    except OSError as error:
        logger.warning("The free space under %s cannot be found out: %s.", output_dir, error)
        return
    if total == 0:  # file systems without a size of their own
        return
    if surely > free:
        raise OSError(
            errno.ENOSPC,
            f"A checkpoint takes about {_gib(surely)}, but only {_gib(free)} are free under output_dir={output_dir!r}: "
            'not one could be saved. Free space, choose another output_dir, or set save_strategy="no"'
            " (save_only_model=True leaves out the optimizer)",
        )
    together = None
    if limit is not None and limit > 0:  # those of before the resume make room, but for one
        together = max(1, limit + 1 - sum(map(is_ours, sort_checkpoints(output_dir))))
    num_kept = min((n for n in (num_saves, together) if n is not None), default=1)
    not_shared = max(1, probably - num_bytes_shared)
    if not_shared * num_kept + num_bytes_shared > free:
        logger.warning(
            "%d checkpoints of about %s are to come under %s (save_total_limit=%s, and one while it is written), but "
            "only %s are free: room for %d. Free space, or set save_total_limit lower, or save_only_model=True.",
            num_kept, _gib(not_shared), output_dir, limit, _gib(free), max(0, free - num_bytes_shared) // not_shared,
        )  # fmt: skip


def check_space_for_run(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    optimizer: Optimizer,
    more_bytes: int,
    num_bytes_shared: int,
    epochs_left: int,
) -> None:
    """`check_free_space` for the rest of a run, each of whose checkpoints holds `more_bytes` besides weights and
    optimizer, and `num_bytes_shared` of them are those of the first.
    """
    surely, probably = predicted_bytes(model, None if args.save_only_model else optimizer)
    strategy, steps_left = SaveStrategy(args.save_strategy).value, state.max_steps - state.global_step
    check_free_space(
        str(args.output_dir),
        (surely + more_bytes, probably + more_bytes),
        num_saves_left(strategy, state.save_steps, steps_left, epochs_left),
        args.save_total_limit,
        num_bytes_shared,
    )


def num_saves_left(save_strategy: str, save_steps: float | None, steps_left: int, epochs_left: int) -> int | None:
    """How many checkpoints a run will make; None where that depends on its metrics."""
    if save_strategy == "steps" and save_steps:
        return -(-steps_left // int(save_steps))
    return {"no": 0, "epoch": epochs_left}.get(save_strategy)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**24 else f"{num_bytes / 2**20:.2f} MiB"
