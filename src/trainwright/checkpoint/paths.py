"""Names of files inside a checkpoint: which ones a loader reads, which ones may be followed, and how they are shown.

Owns: the rule that a name found in a file stays inside the directory, and that it is printed escaped and cut. Leaves to
others: what a file must hold (json_files.py). Imports nothing outside the standard library.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection
from typing import Any

from trainwright import names

INCOMPLETE_NAME = ".incomplete"  # present while a checkpoint is copied into place where rename is missing
DAMAGED = ".damaged"  # what is appended to the name of a checkpoint that is not to be used any more
MAX_JSON_BYTES = 1 << 29  # a log of a million lines has about 1/4 of this
MAX_SHOWN = 100  # characters of a name from a file that are printed
MAX_NAMED = 20  # things of one kind that are named, where a file decides how many there are

# A loader takes the first of these that it finds, so two of them in one directory must belong together.
MODEL_NAMES = frozenset(
    (names.SAFE_WEIGHTS_NAME, names.SAFE_WEIGHTS_INDEX_NAME, names.WEIGHTS_NAME, names.WEIGHTS_INDEX_NAME)
)
WEIGHT_NAMES = (*sorted(MODEL_NAMES), names.ADAPTER_SAFE_WEIGHTS_NAME, names.ADAPTER_WEIGHTS_NAME)
_STATE_NAMES = frozenset(
    (
        *WEIGHT_NAMES,
        names.OPTIMIZER_NAME,
        names.SCHEDULER_NAME,
        names.SCALER_NAME,
        names.TRAINER_STATE_NAME,
        names.LOOP_STATE_NAME,
        names.EMA_WEIGHTS_NAME,
    )
)
_NOT_PLAIN = re.compile(r"[\\:\x00-\x1f]")  # what a name of a file inside a checkpoint does not have
_RNG_NAME = re.compile(r"rng_state(_[0-9]+)?\.pth")


class Damaged(ValueError):
    """A file that cannot be used; `reason` says why without its path."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{os.fspath(path)} is damaged: {reason}")
        self.reason = reason


def shown(text: Any, limit: int = MAX_SHOWN) -> str:
    """`text`, which comes from a file, as it may be printed: no character that moves the cursor or turns the direction
    of writing, and at most `limit` characters.

    >>> shown("a\\rb\\x1b[2K"), shown("x" * 300, 5)
    ('a\\\\rb\\\\x1b[2K', 'xxxxx... (300 characters)')
    """
    whole = text if isinstance(text, str) else str(text)
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole[:limit])
    return escaped if len(whole) <= limit else f"{escaped}... ({len(whole)} characters)"


def named(names_: Collection[Any], limit: int = MAX_NAMED) -> str:
    """`names_`, which come from a file, as they may be printed: the first ones, and how many more there are."""
    return names.some(names_, limit, show=shown)


def wrong_step(directory: str | os.PathLike[str], name: str, step: Any) -> str | None:
    """A sentence where file `name` says another step than the name of its `checkpoint-N`; other names promise none."""
    expected = step_of(directory)
    return None if expected in (None, step) else f"{name} belongs to step {step}, not to step {expected}"


def rng_name(rank: int, world_size: int) -> str:
    """File of one process's random state: `rng_state.pth` alone, `rng_state_<rank>.pth` among several."""
    return "rng_state.pth" if world_size <= 1 else f"rng_state_{rank}.pth"


def step_of(path: str | os.PathLike[str], checkpoint_prefix: str = names.CHECKPOINT_PREFIX) -> int | None:
    """The step in the name of a checkpoint directory; None for any other name.

    >>> step_of("out/checkpoint-500"), step_of("out/checkpoint-500-old"), step_of("out/.checkpoint-500.staged-7")
    (500, None, None)
    """
    match = re.fullmatch(rf"{re.escape(checkpoint_prefix)}-([0-9]+)", os.path.basename(os.path.abspath(path)))
    return int(match[1]) if match else None


def is_state_file(name: str) -> bool:
    """Whether a loader would read a file of this name at the top of a checkpoint."""
    return name in _STATE_NAMES or is_random_state(name)


def is_random_state(name: str) -> bool:
    """Whether this is the name of the random state of one process."""
    return _RNG_NAME.fullmatch(name) is not None


def is_read(name: str) -> bool:
    """Whether something may read a file of this name: weights, adapters and states, in any folder."""
    return is_state_file(name.rpartition("/")[2]) or name.endswith(".safetensors")


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a Trainer wrote the checkpoint `path`: a real directory with a manifest, a trainer state or our mark."""
    markers = (names.MANIFEST_NAME, names.TRAINER_STATE_NAME, INCOMPLETE_NAME)
    return not os.path.islink(path) and any(os.path.isfile(os.path.join(path, name)) for name in markers)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file that is not trusted. Raises FileNotFoundError, or ValueError naming it for a file that
    is no plain file, larger than any Trainer writes, or no JSON.
    """
    path = os.fspath(path)
    inside(os.path.dirname(path) or ".", os.path.basename(path))
    if os.path.getsize(path) > MAX_JSON_BYTES:
        raise Damaged(path, f"it has {os.path.getsize(path)} bytes, more than {MAX_JSON_BYTES}, and was not read.")
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except RecursionError as error:
            raise Damaged(path, "it is nested too deeply.") from error
        except ValueError as error:  # no JSON, no UTF-8, or a number of more digits than Python converts
            raise Damaged(path, f"it is no JSON ({shown(error)}).") from error


def relative_files(directory: str | os.PathLike[str]) -> list[str]:
    """Every entry under `directory` that is not a directory, as sorted names with forward slashes. Follows no link."""
    found = []
    for folder, subfolders, files in os.walk(directory, followlinks=False):
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), directory).replace(os.sep, "/") for name in files + links]
    return sorted(found)


def plain_files(directory: str | os.PathLike[str]) -> dict[str, str]:
    """Name, as of `relative_files`, -> path of every file under `directory`. Raises ValueError, as `inside` does, where
    one is a link or a device, or has a name that could not be read back.
    """
    root, found = os.fspath(directory), {}
    folders = [""]
    for folder in folders:  # grows in the loop
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = folder + entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif entry.is_file(follow_symlinks=False) and not _NOT_PLAIN.search(name):
                    found[name] = entry.path
                else:
                    found[name] = inside(root, name)
    return dict(sorted(found.items()))


def inside(directory: str | os.PathLike[str], name: str) -> str:
    """The path of `name` in `directory`, where `name` was read from a file and is not trusted.

    Raises ValueError unless it is a plain relative name whose path crosses no link and ends at a plain file or nowhere.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or any(part in ("", ".", "..") or _NOT_PLAIN.search(part) for part in parts):
        raise ValueError(f"{shown(repr(name))} is not a plain name of a file inside {os.fspath(directory)}.")
    path = os.fspath(directory)
    mode = stat.S_IFDIR
    for part in parts:
        path = os.path.join(path, part)
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return os.path.join(os.fspath(directory), *parts)
        except OSError as error:  # longer than a name may be, or below a file
            raise ValueError(
                f"{shown(repr(name))} is not a plain name of a file inside {os.fspath(directory)} ({error.strerror})."
            ) from error
        if stat.S_ISLNK(mode):
            raise ValueError(
                f"{shown(repr(name))} in {os.fspath(directory)} is a link. Copy what it points to (`cp -rL`)."
            )
    if not stat.S_ISREG(mode):
        raise ValueError(f"{shown(repr(name))} in {os.fspath(directory)} is not a plain file.")
    return path
