"""The manifest of a checkpoint: every file with its size and hash, written last, so that its presence means "complete".

Owns: `manifest.json`, the check of a directory against it, and the rule for names that come from a file.
Leaves to others: checkpoints that have no manifest (foreign.py), and what to do about a problem (load.py).
Imports nothing outside the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from trainwright.checkpoint.foreign import structural_problems
from trainwright.checkpoint.paths import (
    INCOMPLETE_NAME,
    MAX_JSON_BYTES,
    inside,
    is_state_file,
    read_json,
    relative_files,
    wrong_step,
)
from trainwright.names import LOOP_STATE_NAME, MANIFEST_NAME

FORMAT_VERSION = 1
FROZEN_NOTE = " (frozen weights, in a file that checkpoints of the run share)"  # after what is wrong with one
HASH_BLOCK_BYTES = 1 << 22
# hashlib releases the interpreter lock above 2 KiB, so threads scale until the disk is the limit.
NUM_HASH_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint holds."""

    step: int  # updates done
    world_size: int  # processes of the run that wrote it
    position: dict[str, Any]  # where in the data the run stood, in samples
    # relative name -> {"size": bytes, "sha256": hex}, and "frozen", a fingerprint, where checkpoints share the file
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    writer: str = ""  # name and release of what wrote it


def write_manifest(
    directory: str | os.PathLike[str],
    step: int,
    world_size: int,
    position: dict[str, Any],
    frozen: Mapping[str, dict[str, Any]] | None = None,
    flush: Callable[[str], None] = lambda path: None,
) -> Manifest:
    """Hash every file under `directory` and write `manifest.json`; the caller makes it durable and visible.

    `flush` is called with the path of each file, one after the other, while they are hashed: one keeps the disk busy,
    the other a core. The manifest is written after both.
    `frozen`: what is known of files of frozen weights; one whose "sha256" is known is not hashed.
    Raises ValueError when a link or a device stands in the directory: only plain files can be promised.
    """
    names = [name for name in relative_files(directory) if name != MANIFEST_NAME]
    paths = {name: inside(directory, name) for name in names}
    known = frozen or {}
    to_hash = [name for name in names if "sha256" not in known.get(name, ())]
    with ThreadPoolExecutor(NUM_HASH_THREADS) as pool, ThreadPoolExecutor(1) as beside:
        flushed = beside.map(flush, paths.values())
        hashes = dict(zip(to_hash, pool.map(lambda name: sha256_of(paths[name]), to_hash)))
        list(flushed)  # raises what a call raised
    files = {
        name: {"size": os.path.getsize(path), "sha256": hashes.get(name)} | known.get(name, {})
        for name, path in paths.items()
    }
    manifest = Manifest(step, world_size, position, files, FORMAT_VERSION, _writer())
    body = asdict(manifest)
    text = json.dumps(body | {"checksum": _checksum(body)}, indent=2, sort_keys=True) + "\n"
    with open(os.path.join(directory, MANIFEST_NAME), "w", encoding="utf-8") as file:
        file.write(text)
    return manifest


def read_manifest(directory: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of `directory`, or None where there is none. Raises ValueError when it is damaged or too new."""
    path = os.path.join(directory, MANIFEST_NAME)
    try:
        body = read_json(path)
        checksum = body.pop("checksum")
        if body["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{path} has format {body['format_version']}, newer than the {FORMAT_VERSION} that this release reads. "
                "Upgrade trainwright."
            )
        if checksum != _checksum(body):
            raise ValueError(f"{path} has changed since it was written: its own checksum does not match.")
        manifest = Manifest(**body)
        if not (isinstance(manifest.files, dict) and isinstance(manifest.position, dict)):
            raise TypeError("`files` and `position` must be objects")
        return manifest
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: it is not the JSON object that trainwright writes ({error}).") from error


def problems(directory: str | os.PathLike[str], *, deep: bool = True) -> list[str]:
    """Everything that is wrong with a checkpoint, one plain sentence per file; an empty list means it can be trusted.

    `deep` reads every byte (about 1.5 GB per second and core); without it only presence and sizes are compared.
    """
    if not os.path.isdir(directory):
        return [f"{os.fspath(directory)} is not a directory"]
    if os.path.lexists(os.path.join(directory, INCOMPLETE_NAME)):
        return ["copying it into place was never finished"]
    try:
        manifest = read_manifest(directory)
    except (ValueError, OSError) as error:
        return [str(error)]
    if manifest is None:
        if os.path.lexists(os.path.join(directory, LOOP_STATE_NAME)):
            return [
                f"{MANIFEST_NAME} is missing, though {LOOP_STATE_NAME} shows that trainwright wrote this checkpoint"
            ]
        return structural_problems(directory, deep=deep)
    other_step = wrong_step(directory, MANIFEST_NAME, manifest.step)
    if other_step:
        return [other_step]
    check = partial(_problem_of, directory, deep=deep)
    with ThreadPoolExecutor(NUM_HASH_THREADS) if deep else nullcontext() as pool:
        found = (pool.map if pool is not None else map)(check, manifest.files, manifest.files.values())
        result = [
            sentence + (FROZEN_NOTE if isinstance(entry, dict) and "frozen" in entry else "")
            for sentence, entry in zip(found, manifest.files.values())
            if sentence
        ]
    # A file that the loader would read but that nobody promised: put there by hand, or left by something else.
    unlisted = (n for n in relative_files(directory) if n not in manifest.files and is_state_file(n))
    return result + [
        f"{name} is not in the manifest, so it was added after the checkpoint was written" for name in unlisted
    ]


def sha256_of(path: str) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(HASH_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while num_bytes := file.readinto(block):
            digest.update(block[:num_bytes])
    return digest.hexdigest()


def _problem_of(directory: str | os.PathLike[str], name: str, expected: Any, *, deep: bool) -> str | None:
    """What is wrong with one file that the manifest lists, or None."""
    try:
        path = inside(directory, name)
        status = os.stat(path, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is not a plain file"
        size = int(expected["size"])
        if status.st_size == 0 and size > 0:
            return f"{name} is empty; it had {size} bytes"
        if status.st_size < size:
            return f"{name} is truncated: {status.st_size} of {size} bytes"
        if status.st_size > size:
            return f"{name} has grown: {status.st_size} instead of {size} bytes"
        if name.endswith(".json") and size > MAX_JSON_BYTES:
            return f"{name} has {size} bytes, more than {MAX_JSON_BYTES}, and is not read"
        if deep and sha256_of(path) != expected["sha256"]:
            return f"{name} has changed: its SHA-256 differs from the one in the manifest"
    except FileNotFoundError:
        return f"{name} is missing"
    except (KeyError, TypeError, ValueError, OSError) as error:
        return f"{name} cannot be checked: {error}"
    return None


def _checksum(body: dict[str, Any]) -> str:
    """SHA-256 of the manifest's own content, independent of how it is laid out."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _writer() -> str:
    from trainwright import __version__

    return f"trainwright {__version__}"


def how_to_accept(directory: str | os.PathLike[str]) -> str:
    """A sentence for someone who edited a checkpoint and reads that it is damaged (`accept.py`)."""
    return f" If it was edited on purpose: `trainwright check --accept {os.fspath(directory)}`."
