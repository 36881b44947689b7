"""Running out of device memory, and trying again with less.

Owns: recognising an out-of-memory error and halving a batch size after one. Leaves to others: what is retried.
Source: seed 001 (`auto_find_batch_size`).
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

# What allocators of devices without torch.OutOfMemoryError say.
_MESSAGES = ("out of memory", "CUDNN_STATUS_NOT_SUPPORTED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocator, of the device or of the host, had no room left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message.lower() in str(error).lower() for message in _MESSAGES)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None, starting_batch_size: int = 128, auto_find_batch_size: bool = True
) -> Any:
    """Call `function(batch_size, ...)`, halving the batch size after each out-of-memory error. Usable as a decorator.

    With `auto_find_batch_size=False` it is called once. Raises RuntimeError when a batch of one sample does not fit
    either.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            auto_find_batch_size=auto_find_batch_size,
        )
    if not auto_find_batch_size:
        return functools.partial(function, starting_batch_size)
    if not inspect.signature(function).parameters:
        raise TypeError(f"{function.__name__} must take the batch size as its first argument.")

    @functools.wraps(function)
    def attempt(*args: Any, **kwargs: Any) -> Any:
        batch_size = starting_batch_size
        while batch_size > 0:
            try:
                return function(batch_size, *args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("Out of memory with %s samples per micro-batch; trying %s.", batch_size, batch_size // 2)
            # Outside the except block: there, the traceback would keep the tensors alive that must be freed.
            free_memory()
            batch_size //= 2
        raise RuntimeError(
            "Out of memory even with one sample per micro-batch. Use a smaller model, shorter samples or a "
            "larger device."
        )

    return attempt


def free_memory() -> None:
    """Drop dead cycles and give cached blocks back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
