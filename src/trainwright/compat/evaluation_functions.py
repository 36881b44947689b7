"""Small documented functions that nothing here needs, because scripts import them. Names: `trainer_pt_utils`.

Owns: their behaviour. Leaves to others: the way from a batch to a metric.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

# torch gave it at every checkpoint of a schedule
_SCHEDULER_SAVE_WARNING = "Please also save or load the state of the optimizer"


def reissue_pt_warnings(caught_warnings: Iterable[warnings.WarningMessage]) -> None:
    """Warn again of what `warnings.catch_warnings(record=True)` held back, except torch's advice about schedules."""
    for caught in caught_warnings:
        if not str(caught.message).startswith(_SCHEDULER_SAVE_WARNING):
            warnings.warn(caught.message, caught.category, stacklevel=2)


def set_rng_state_for_device(
    device_name: str, device_module: Any, checkpoint_rng_state: dict[str, Any], is_distributed: bool
) -> None:
    """Restore the RNG state of a device type ("CUDA", "NPU" ...); a failure is logged, not raised.

    is_distributed: the state is that of all devices of the process, not only of the current one.
    """
    try:
        state = checkpoint_rng_state[device_name.lower()]
        if is_distributed:
            device_module.random.set_rng_state_all(state)
        else:
            device_module.random.set_rng_state(state)
    except Exception as error:
        logger.warning(
            "%s random state not restored; the run differs from an uninterrupted one: %r", device_name, error
        )


def safe_globals() -> Any:
    """A context in which `torch.load(weights_only=True)` accepts the NumPy random state in an `rng_state*.pth`."""
    reconstruct: Any = np.empty(0).__reduce__()[0]  # its module is another in NumPy 1 and 2
    return torch.serialization.safe_globals([reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))])


def remove_dummy_checkpoint(
    is_main_process: bool, output_dir: str | os.PathLike[str], filenames: Iterable[str]
) -> None:
    """Delete the named files of `output_dir` on the main process: placeholders that a sharded save writes."""
    if is_main_process:
        for filename in filenames:
            path = os.path.join(output_dir, filename)
            if os.path.isfile(path):
                os.remove(path)


def number_of_arguments(func: Callable[..., Any]) -> int:
    """How many arguments `func` can be given; those a `functools.partial` fixed do not count."""
    bound = getattr(func, "keywords", {})
    return sum(name not in bound for name in inspect.signature(func).parameters)


def is_attention_mask_causal(attention_mask: torch.Tensor | None) -> bool:
    """Whether no position attends to a later one.

    (batch, seq) masks only padding and None masks nothing: both leave a causal model causal. (batch, seq, seq)
    and (batch, heads, seq, seq) hold 0, False or a large negative number where attention is masked. One host sync.
    """
    if attention_mask is None or attention_mask.ndim == 2:
        return True
    if attention_mask.ndim not in (3, 4):
        return False
    return not bool((attention_mask.triu(diagonal=1) > 0).any())
