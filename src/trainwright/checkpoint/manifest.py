"""The manifest of a checkpoint: every file with its size and hash, written last, so that its presence means "complete".

Owns: `manifest.json`, the check of a directory against it, and the rule for names that come from a file.
Leaves to others: checkpoints that have no manifest (without_manifest.py), and what to do about a problem (load.py).
Imports nothing outside the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from trainwright.checkpoint.json_files import problem_of, read_manifest_body
from trainwright.checkpoint.paths import (
    INCOMPLETE_NAME,
    MAX_JSON_BYTES,
    MAX_NAMED,
    inside,
    is_random_state,
    is_read,
    plain_files,
    relative_files,
    shown,
    wrong_step,
)
from trainwright.checkpoint.without_manifest import structural_problems
from trainwright.names import LOOP_STATE_NAME, MANIFEST_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

FORMAT_VERSION = 1
MAX_SENTENCE = 1000  # characters of what is said about one file
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
    Raises ValueError where the directory holds a link or a device: only plain files can be promised.
    """
    paths = plain_files(directory)
    paths.pop(MANIFEST_NAME, None)
    known = frozen or {}
    to_hash = {name: path for name, path in paths.items() if "sha256" not in known.get(name, ())}
    with ThreadPoolExecutor(NUM_HASH_THREADS) as pool, ThreadPoolExecutor(1) as flushing:
        flushed = flushing.map(flush, paths.values())
        hashes = dict(zip(to_hash, pool.map(sha256_of, to_hash.values())))
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
        body = read_manifest_body(path, FORMAT_VERSION)
    except FileNotFoundError:
        return None
    checksum = body.pop("checksum")
    if checksum != _checksum(body):
        raise ValueError(f"{path} has changed since it was written: its own checksum does not match.")
    return Manifest(**body)


def problems(directory: str | os.PathLike[str], *, deep: bool = True) -> list[str]:
    """Everything that is wrong with a checkpoint, one plain sentence per file; an empty list means it can be trusted.

    `deep` reads every byte (about 1.5 GB per second and core); without it only presence and sizes are compared. Of what
    is wrong in the same way with many files, which a file can claim without end, only the first are named.
    """
    return [shown(sentence, MAX_SENTENCE) for sentence in _problems(directory, deep)]


def _problems(directory: str | os.PathLike[str], deep: bool) -> list[str]:
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
        return some_of(structural_problems(directory, deep=deep))
    other_step = wrong_step(directory, MANIFEST_NAME, manifest.step)
    if other_step:
        return [other_step]
    # Names first: a manifest of a million costs no million looks at the disk.
    there = set(relative_files(directory))
    absent = [name for name in manifest.files if name not in there]
    listed = [name for name in manifest.files if name in there]
    check = partial(_problem_of, directory, deep=deep)
    with ThreadPoolExecutor(NUM_HASH_THREADS) if deep else nullcontext() as pool:
        names = absent[:MAX_NAMED] + listed
        found = (pool.map if pool is not None else map)(check, names, [manifest.files[name] for name in names])
        wrong = {name: sentence for name, sentence in zip(names, found) if sentence}
    inner: Iterable[str | None] = (_content(directory, name, manifest) for name in listed if deep and name not in wrong)
    if deep and not wrong and any(name.startswith("sharded/") for name in listed):
        inner = (*inner, _problem_of_parts(directory))
    unlisted = (_unlisted(directory, name) for name in sorted(there - manifest.files.keys()))
    result = [sentence + (FROZEN_NOTE if "frozen" in manifest.files[name] else "") for name, sentence in wrong.items()]
    if len(absent) > MAX_NAMED:
        result.insert(MAX_NAMED, f"{len(absent) - MAX_NAMED:,} more files of the manifest are missing")
    return result[: MAX_NAMED + 1] + some_of([*result[MAX_NAMED + 1 :], *filter(None, inner), *filter(None, unlisted)])


def some_of(sentences: list[str]) -> list[str]:
    """`sentences`, of which only the first are shown where there are very many."""
    if len(sentences) <= MAX_NAMED + 1:
        return sentences
    return [*sentences[:MAX_NAMED], f"and {len(sentences) - MAX_NAMED:,} more of this kind"]


def _content(directory: str | os.PathLike[str], name: str, manifest: Manifest) -> str | None:
    """What is wrong inside a file that is as it was promised: its manifest may be written by the same hand."""
    found = None
    if name in (TRAINER_STATE_NAME, LOOP_STATE_NAME):
        found = problem_of(inside(directory, name), name, manifest.step)
    if found is None and (is_random_state(name) or name in (SCHEDULER_NAME, LOOP_STATE_NAME)):
        from trainwright.checkpoint.state_values import file_problem

        found = file_problem(inside(directory, name), name, is_promised=True)
    return found


def _problem_of_parts(directory: str | os.PathLike[str]) -> str | None:
    """What keeps files that are as they were promised from making whole tensors."""
    from trainwright.checkpoint import sharded

    return sharded.problem(directory)


def _unlisted(directory: str | os.PathLike[str], name: str) -> str | None:
    """What is wrong with an entry that the manifest does not list: put there by hand, or a left-over."""
    if name == MANIFEST_NAME:
        return None
    try:
        inside(directory, name)
    except (ValueError, OSError) as error:  # a link or a pipe
        return f"{shown(name)} is not in the manifest: {error}"
    if not is_read(name):
        return None
    return f"{shown(name)} is not in the manifest, so it was added after the checkpoint was written"


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
    label = shown(name)
    try:
        path = inside(directory, name)
        status = os.stat(path, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            return f"{label} is not a plain file"
        size = expected["size"]
        if status.st_size == 0 and size > 0:
            return f"{label} is empty; it had {size} bytes"
        if status.st_size < size:
            return f"{label} is truncated: {status.st_size} of {size} bytes"
        if status.st_size > size:
            return f"{label} has grown: {status.st_size} instead of {size} bytes"
        if name.endswith(".json") and size > MAX_JSON_BYTES:
            return f"{label} has {size} bytes, more than {MAX_JSON_BYTES}, and is not read"
        if deep and sha256_of(path) != expected["sha256"]:
            return f"{label} has changed: its SHA-256 differs from the one in the manifest"
    except FileNotFoundError:
        return f"{label} is missing"
    except (ValueError, OSError) as error:
        return f"{label} cannot be checked: {error}"
    return None


def _checksum(body: dict[str, Any]) -> str:
    """SHA-256 of the manifest's content, independent of how it is laid out."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _writer() -> str:
    from trainwright import __version__

    return f"trainwright {__version__}"


def how_to_accept(directory: str | os.PathLike[str]) -> str:
    """A sentence for someone who edited a checkpoint and reads that it is damaged (`accept.py`)."""
    return f" If it was edited on purpose: `trainwright check --accept {os.fspath(directory)}`."
