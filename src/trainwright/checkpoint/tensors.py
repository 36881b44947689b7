"""Read a file of tensors without running anything that is in it.

Owns: the one call of `torch.load`. Leaves to others: which file, and what its content is for.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from typing import Any

import numpy as np
import torch

from trainwright.checkpoint.paths import shown
from trainwright.checkpoint.without_manifest import check_archive


class ForeignObjects(ValueError):
    """A file holds objects of a class that this process does not allow; another one may."""


def load_tensors(path: str | os.PathLike[str], map_location: Any = "cpu", *, mmap: bool = True) -> Any:
    """The content of a `torch.save` file: tensors, NumPy arrays of numbers and plain Python values, nothing else.

    `mmap` maps the file instead of reading it, so memory is used only for what is copied out of it. Raises
    FileNotFoundError, or ValueError naming the file and the cure when it is damaged or holds other objects.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing.")
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        check_archive(path)
    try:
        with torch.serialization.safe_globals(NUMPY_GLOBALS):
            # Files from before torch 1.6 are no archives and cannot be mapped.
            return torch.load(path, map_location, weights_only=True, mmap=mmap and is_archive)
    except pickle.UnpicklingError as error:
        reason = (
            str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
            or str(error).partition("\n")[0]
        )
        raise ForeignObjects(
            f"{path} holds more than tensors and plain values, or is damaged, and was not loaded: {shown(reason, 300)} "
            "If you trust its source, allow the class it names with torch.serialization.add_safe_globals([...])."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged or truncated: {shown(first_line, 300)}. Use an older checkpoint."
        ) from error


def _numpy_globals() -> list[Any]:
    """What the pickle of a NumPy array or scalar of numbers names: four functions and one class per dtype.

    NumPy 2 renamed `numpy.core` to `numpy._core`, so each function is allowed under both names.
    """
    arrays = np.zeros(1, np.uint32).__reduce__()[0]
    scalars = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype]
    allowed += [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    for function, name in ((arrays, "_reconstruct"), (scalars, "scalar")):
        allowed += [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    return allowed


NUMPY_GLOBALS = _numpy_globals()
