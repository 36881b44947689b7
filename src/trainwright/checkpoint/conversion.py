"""Weights whose names differ between a `transformers` model in memory and its files.

Owns: asking the library to convert them (5.x fuses experts and renames modules; 4.x renames some). Leaves to others:
files whose names match, which need none of this and no second copy of the model.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)


def load_converted(model: Any, tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[str]] | None:
    """Load `tensors`, named as in the files of `model`'s release, into `model`; names missing and unexpected.

    None where the library cannot build a second model of this class, or converts nothing better. Costs a copy of the
    model in memory. float32 holds bfloat16 and float16 exactly, so the detour changes no bit.
    """
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32
    try:
        # The library initialises a model before it fills it, which must not move the run's random state.
        with torch.random.fork_rng(devices=[]):
            other, info = type(model).from_pretrained(
                None, config=copy.deepcopy(model.config), state_dict=tensors, torch_dtype=wide, output_loading_info=True
            )
    except Exception as error:  # whatever a user's class or release raises: the plain result is used
        logger.info("The weights could not be converted by %s: %s", type(model).__name__, error)
        return None
    missing = set(info["missing_keys"])
    model.load_state_dict(
        {name: value for name, value in other.state_dict().items() if name not in missing}, strict=False
    )
    return sorted(missing), sorted(info["unexpected_keys"])
