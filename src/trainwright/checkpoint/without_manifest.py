"""Checkpoints without a manifest (other implementations, older releases): the strongest check their files allow.

Owns: structure. A safetensors file knows its own length, a torch file is a zip archive with a CRC per tensor, JSON
parses or not. Leaves to others: bits that flipped inside a safetensors file, which nothing in it can reveal.
"""

from __future__ import annotations

import os
import zipfile

from trainwright import names
from trainwright.checkpoint.json_files import problem_of
from trainwright.checkpoint.paths import (
    WEIGHT_NAMES,
    inside,
    is_random_state,
    is_state_file,
    named,
    read_json,
    relative_files,
    shown,
    step_of,
)

# Directories that sharded backends write instead of one weights or optimizer file.
_SHARDED_PREFIXES = ("global_step", "pytorch_model_fsdp", "optimizer_")


def structural_problems(directory: str | os.PathLike[str], *, deep: bool = True) -> list[str]:
    """What is visibly wrong with a checkpoint that has no manifest; `deep` also checks every CRC."""
    found = relative_files(directory)
    top = set(os.listdir(directory))
    result = []
    if names.TRAINER_STATE_NAME not in top:  # the file that others write last
        result.append(f"{names.TRAINER_STATE_NAME} is missing: the save was interrupted, or this is not a checkpoint")
    sharded = any(entry.startswith(_SHARDED_PREFIXES) for entry in top)
    if not sharded and not top.intersection(WEIGHT_NAMES):
        result.append(f"the weights are missing: none of {', '.join(WEIGHT_NAMES)} is there")
    if names.OPTIMIZER_NAME in top and names.SCHEDULER_NAME not in top:
        result.append(f"{names.SCHEDULER_NAME} is missing, though {names.OPTIMIZER_NAME} is there")
    if names.SCHEDULER_NAME in top and not sharded and not top.intersection((names.OPTIMIZER_NAME, "optimizer.bin")):
        result.append(f"{names.OPTIMIZER_NAME} is missing, though {names.SCHEDULER_NAME} is there")
    for name in found:
        try:
            sentence = _problem_of(directory, name, deep)
        except (ValueError, OSError) as error:
            sentence = f"{shown(name)} cannot be checked: {error}"
        if sentence:
            result.append(sentence)
    return result


def check_archive(path: str) -> None:
    """Raise ValueError for a torch file that would take more memory than disk: torch stores, it never compresses."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile reads damaged bytes as a password, a method, a size, and says so each way
        raise ValueError(f"{path} is damaged or truncated: {shown(error, 300)}. Use an older checkpoint.") from error
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or (
        sum(e.file_size for e in entries) > os.path.getsize(path)
    ):
        raise ValueError(f"{path} is compressed or overlaps itself, which torch never writes, and was not read.")


def _problem_of(directory: str | os.PathLike[str], name: str, deep: bool) -> str | None:
    path = inside(directory, name)  # also of what is not read: a link and a pipe are in no checkpoint
    suffix = os.path.splitext(name)[1]
    if suffix not in (".safetensors", ".pt", ".pth", ".bin", ".json"):
        return None
    if os.path.getsize(path) == 0:
        return f"{shown(name)} is empty"
    if suffix == ".safetensors":
        return _safetensors_problem(path, shown(name))
    if suffix == ".json":
        return _json_problem(directory, path, name)
    return _archive_problem(path, name, deep)


def _safetensors_problem(path: str, name: str) -> str | None:
    """Opening reads the header and compares the offsets in it with the size of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            return None
    except SafetensorError as error:
        return f"{name} is damaged: {shown(error, 300)}"


def _archive_problem(path: str, name: str, deep: bool) -> str | None:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"PK\x03\x04":
        return _not_an_archive(path, name)
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip() if deep else None
    except Exception as error:  # as above
        return f"{shown(name)} is damaged or truncated: {shown(error, 300)}"
    if broken:
        return f"{shown(name)} is damaged: the checksum of {shown(broken)} in it does not match"
    if deep and (is_random_state(name) or name == names.SCHEDULER_NAME):
        from trainwright.checkpoint.state_values import file_problem

        return file_problem(path, name)
    return _unreadable(path) if deep and is_state_file(name) else None


def _not_an_archive(path: str, name: str) -> str | None:
    """A file from before torch 1.6 is a bare pickle: it is whole if it can be read."""
    return None if name == names.TRAINING_ARGS_NAME else _unreadable(path)  # that one is never read


def _unreadable(path: str) -> str | None:
    """Why torch cannot read a file, which never runs code from it; tensors of an archive are mapped, not loaded."""
    from trainwright.checkpoint.tensors import load_tensors

    try:
        load_tensors(path)
    except ValueError as error:
        return str(error)
    return None


def _json_problem(directory: str | os.PathLike[str], path: str, name: str) -> str | None:
    damage = problem_of(path, name, step_of(directory))
    if damage or not name.endswith(".index.json"):
        return damage
    content = read_json(path)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        return f"{shown(name)} is damaged: it has no weight_map"
    missing = sorted(shard for shard in set(shards.values()) if not os.path.isfile(inside(directory, shard)))
    return f"{named(missing)} is missing, though {shown(name)} names it" if missing else None
