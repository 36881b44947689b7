"""Names of files inside a checkpoint: which ones a loader reads, and which ones may be followed.

Owns: the rule that a name found in a file stays inside the directory. Leaves to others: reading what is there.
Imports nothing outside the standard library.
"""

from __future__ import annotations

import os
import re
import stat

from trainwright import names

INCOMPLETE_NAME = ".incomplete"  # present while a checkpoint is copied into place where rename is missing

WEIGHT_NAMES = (
    names.SAFE_WEIGHTS_NAME,
    names.SAFE_WEIGHTS_INDEX_NAME,
    names.WEIGHTS_NAME,
    names.WEIGHTS_INDEX_NAME,
    names.ADAPTER_SAFE_WEIGHTS_NAME,
    names.ADAPTER_WEIGHTS_NAME,
)
_STATE_NAMES = frozenset(
    (
        *WEIGHT_NAMES,
        names.OPTIMIZER_NAME,
        names.SCHEDULER_NAME,
        names.SCALER_NAME,
        names.TRAINER_STATE_NAME,
        names.LOOP_STATE_NAME,
    )
)
_RNG_NAME = re.compile(r"rng_state(_\d+)?\.pth")


def rng_name(rank: int, world_size: int) -> str:
    """File of one process's random state: `rng_state.pth` alone, `rng_state_<rank>.pth` among several."""
    return "rng_state.pth" if world_size <= 1 else f"rng_state_{rank}.pth"


def is_state_file(name: str) -> bool:
    """Whether a loader would read a file of this name at the top of a checkpoint."""
    return name in _STATE_NAMES or _RNG_NAME.fullmatch(name) is not None


def relative_files(directory: str | os.PathLike[str]) -> list[str]:
    """Every entry under `directory` that is not a directory, as sorted names with forward slashes. Follows no link."""
    found = []
    for folder, subfolders, files in os.walk(directory, followlinks=False):
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), directory).replace(os.sep, "/") for name in files + links]
    return sorted(found)


def inside(directory: str | os.PathLike[str], name: str) -> str:
    """The path of `name` in `directory`, where `name` was read from a file and is not trusted.

    Raises ValueError unless it is a plain relative name whose path crosses no link and ends at a plain file or nowhere.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or any(part in ("", ".", "..") or re.search(r"[\\:\x00-\x1f]", part) for part in parts):
        raise ValueError(f"{name!r} is not a plain name of a file inside {os.fspath(directory)}.")
    path = os.fspath(directory)
    mode = stat.S_IFDIR
    for part in parts:
        path = os.path.join(path, part)
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return os.path.join(os.fspath(directory), *parts)
        if stat.S_ISLNK(mode):
            raise ValueError(f"{name!r} in {os.fspath(directory)} is a link. Copy what it points to (`cp -rL`).")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name!r} in {os.fspath(directory)} is not a plain file.")
    return path
