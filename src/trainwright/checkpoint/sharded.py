"""Weights and optimizer state in parts: each process writes its own, and any number of processes reads them.

Owns: the folder `sharded/` of a checkpoint, as `torch.distributed.checkpoint` (DCP) plans and reads it, and making one
file of it. Leaves to others: the directory that is staged, promised and named as every checkpoint is (save.py,
commit.py), writing a file now or in the background (sink.py), and what is small (`optimizer.pt` holds the options and
what is no part).

The files are safetensors: DCP's own format has an index that is a pickle, and no code in a checkpoint is run. Neither
writing nor reading needs another process: which part is whose follows from the mesh. Names: in `model/` those of the
state dict, in `optimizer/` "<number of the parameter>.<name>".
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainwright import names, shards
from trainwright.checkpoint import sink
from trainwright.checkpoint.paths import Damaged, inside, read_json, shown
from trainwright.checkpoint.tensors import load_tensors

if TYPE_CHECKING:
    from trainwright.parallel.strategy import Strategy

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]

FOLDER = "sharded"
MODEL, OPTIMIZER = "model", "optimizer"  # inside it
PART_FOLDERS = (f"{FOLDER}/{MODEL}", f"{FOLDER}/{OPTIMIZER}")
TIES_NAME = "ties.json"  # in `model/`: name in the state dict -> name under which its tensor is written


def has_parts(directory: Path, of: str) -> bool:
    """Whether `directory` holds parts of the weights (`MODEL`) or of the optimizer's state (`OPTIMIZER`)."""
    folder = os.path.join(directory, FOLDER, of)
    return os.path.isdir(folder) and any(name.endswith(".safetensors") for name in os.listdir(folder))


# -- writing -----------------------------------------------------------------------------------------------------------


def save_model_parts(directory: Path, model: nn.Module, strategy: Strategy, *, precedes_collective: bool) -> None:
    """Write this process's part of the weights of `model`. What every process has whole, the first writes.

    `precedes_collective`: all processes call one before the directory is committed, which asks who failed. Then this is
    one, too, and raises in all of them the OSError of a disk that failed in one.
    """
    shards.reshard(model)
    weights, ties = _without_ties(model)
    with _failing_together(strategy) if precedes_collective else contextlib.nullcontext():
        _write(directory, MODEL, weights, strategy)
        if strategy.is_main:
            sink.write("json", os.path.join(directory, FOLDER, MODEL, TIES_NAME), ties)


def optimizer_state_to_save(optimizer: Any, directory: Path, strategy: Strategy) -> dict[str, Any]:
    """What `optimizer.pt` is to hold where the state is divided over processes, which call this together: all of it,
    or what is no part, where each process writes its own, which it does here.
    """
    state = optimizer.state_dict()
    if not strategy.writes_parts:
        return shards.whole_state(state, keep=strategy.should_save)  # type: ignore[no-any-return]
    _write(directory, OPTIMIZER, _divided(state), strategy)
    return without_parts(state)


@contextlib.contextmanager
def _failing_together(strategy: Strategy) -> Iterator[None]:
    """Raise in all processes what one of them raised within: what follows may be a collective."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = strategy.first_error(error)
    if failed is not None:
        raise failed


def _write(directory: Path, of: str, tensors: dict[str, Any], strategy: Strategy) -> None:
    """Write what this process has of `tensors` and no other does, where it has anything, as DCP's writer of safetensors
    does, which would also gather the plans of all processes, and could not be used in the background.
    """
    own = {name: one for name, one in tensors.items() if _is_writer_of(one, strategy.is_main)}
    if not own:
        return
    offsets = {name: {"saved_offsets": list(_offsets(one))} for name, one in own.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    name = f"shard-{strategy.process_index + 1:05}-model-00001-of-00001.safetensors"
    parts = {name: shards.local_part(one).contiguous() for name, one in own.items()}
    sink.write("tensors", os.path.join(directory, FOLDER, of, name), parts, metadata)


def _is_writer_of(tensor: Any, is_main: bool) -> bool:
    """Of what several processes have, whole or a part of, the first one writes."""
    if not shards.is_sharded(tensor):
        return is_main
    where = tensor.device_mesh.get_coordinate()
    return where is not None and all(at == 0 or one.is_shard() for at, one in zip(where, tensor.placements))


def _offsets(tensor: Any) -> tuple[int, ...]:
    """Where in the whole tensor this process's part begins, in each dimension. As DCP plans it, which takes 0.1 ms, so
    that it is remembered for tensors that are divided alike.
    """
    if not shards.is_sharded(tensor):
        return (0,) * int(tensor.ndim)
    key = tensor.shape, tensor.device_mesh, tensor.placements
    found: tuple[int, ...] | None = _known_offsets.get(key)
    if found is None:
        from torch.distributed.checkpoint.default_planner import create_default_local_save_plan

        (item,) = create_default_local_save_plan({"": tensor}, is_coordinator=False).items
        found = _known_offsets[key] = tuple(item.index.offset or ())
    return found


_known_offsets: dict[Any, tuple[int, ...]] = {}


def without_parts(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without what is divided."""
    state = {
        number: {name: value for name, value in values.items() if not shards.is_sharded(value)}
        if isinstance(values, Mapping)
        else values
        for number, values in optimizer_state.get("state", {}).items()
    }
    return {**optimizer_state, "state": state}


def _divided(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{number}.{name}": value
        for number, values in optimizer_state.get("state", {}).items()
        if isinstance(values, Mapping)
        for name, value in values.items()
        if shards.is_sharded(value)
    }


def _without_ties(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state dict, each tensor under its first name, and the first name of every other."""
    first: dict[int, str] = {}
    weights: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            continue
        original = first.setdefault(id(value), name)
        if original == name:
            weights[name] = value.detach()
        else:
            ties[name] = original
    return weights, ties


# -- reading -----------------------------------------------------------------------------------------------------------


def load_model_parts(model: nn.Module, directory: Path) -> tuple[list[str], list[str]]:
    """Put the weights in `directory` into `model`, of whose tensors this process may have the whole or a part.

    Returns (names that are missing there, names that have no place here). Raises ValueError for another shape.
    """
    sizes = _sizes(directory, MODEL)
    ties = _ties(directory)
    entries = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}
    stored_as = {name: ties.get(name, name) for name in entries}
    loaded: dict[int, str] = {}
    targets: dict[str, torch.Tensor] = {}
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, value in entries.items():
        stored = stored_as[name]
        if stored not in sizes or id(value) in loaded:
            continue
        loaded[id(value)] = name
        if tuple(sizes[stored][0]) != tuple(value.shape):
            raise RuntimeError(
                f"{os.path.join(directory, FOLDER)} does not fit {type(model).__name__}: {shown(name)} has the shape "
                f"{tuple(sizes[stored][0])} there, and {tuple(value.shape)} here."
            )
        if stored in targets:  # tied there, and not here
            copies.append((value.detach(), targets[stored]))
        else:
            targets[stored] = value.detach()
    _read(targets, directory, MODEL)
    with torch.no_grad():
        for target, source in copies:
            target.copy_(source)
    missing = [name for name, value in entries.items() if id(value) not in loaded]
    return missing, sorted(set(sizes) - set(stored_as.values()))


def with_optimizer_parts(directory: Path, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state in `optimizer.pt` with what was divided, as the parameters of `optimizer` are divided now.

    Raises ValueError for parts that belong to no parameter, or have another shape.
    """
    sizes = _sizes(directory, OPTIMIZER)
    if not sizes:
        return state
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    targets: dict[str, Any] = {}
    filled = {number: dict(values) for number, values in state["state"].items()}
    for name, (size, dtype) in sizes.items():
        number, _, key = name.partition(".")
        parameter = parameters.get(int(number)) if number.isdigit() else None
        if parameter is None or tuple(size) != tuple(parameter.shape):
            here = "no such parameter" if parameter is None else f"a parameter of the shape {tuple(parameter.shape)}"
            raise ValueError(
                f"{os.path.join(directory, FOLDER)} does not fit {type(optimizer).__name__}: {shown(name)} has the "
                f"shape {tuple(size)} there, and there is {here}. Check the model, its frozen parts and `optim`."
            )
        target = torch.empty_like(parameter.detach(), dtype=dtype)
        targets[name] = target
        filled.setdefault(int(number), {})[key] = target
    _read(targets, directory, OPTIMIZER)
    return {**state, "state": filled}


def _read(targets: dict[str, Any], directory: Path, of: str) -> None:
    """Fill `targets`, tensors or DTensors, from the files; each process reads what it needs, alone."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if not targets:
        return
    folder = os.path.join(directory, FOLDER, of)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which it need not be
            dcp.load(  # type: ignore[attr-defined]
                targets, storage_reader=HuggingFaceStorageReader(folder), no_dist=True
            )
    except dcp.api.CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {shown(error, 500)}. Use an older checkpoint.") from error


def _sizes(directory: Path, of: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor of which there are parts, from the heads of the files. Raises ValueError where a
    part of one is missing.
    """
    if not has_parts(directory, of):
        return {}
    folder = os.path.join(directory, FOLDER, of)
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        metadata = HuggingFaceStorageReader(folder).read_metadata()
    except Exception as error:  # safetensors, JSON, and what DCP makes of either
        raise Damaged(folder, f"its parts cannot be read ({shown(error, 300)}).") from error
    found: dict[str, Any] = metadata.state_dict_metadata
    for name, one in found.items():
        covered = sum(math.prod(chunk.sizes) for chunk in one.chunks)
        if covered != math.prod(one.size):
            raise Damaged(
                folder, f"{covered} of the {math.prod(one.size)} numbers of {shown(name)} are there: a part is missing."
            )
    return {name: (one.size, one.properties.dtype) for name, one in found.items()}


def _ties(directory: Path) -> dict[str, str]:
    path = inside(directory, f"{FOLDER}/{MODEL}/{TIES_NAME}")
    if not os.path.isfile(path):
        return {}
    ties = read_json(path)
    if not isinstance(ties, dict) or not all(isinstance(name, str) for name in ties.values()):
        raise Damaged(path, "it is no table of names.")
    return ties


def problem(directory: Path) -> str | None:
    """What is wrong with the parts in `directory`, whose files are as they were promised; None: they make wholes."""
    try:
        for of in (MODEL, OPTIMIZER):
            _sizes(directory, of)
        _ties(directory)
    except (ValueError, OSError) as error:
        return str(error)
    return None


# -- one file ----------------------------------------------------------------------------------------------------------


def whole_model(directory: Path) -> dict[str, torch.Tensor]:
    """The state dict in `directory`, whole; names that shared a tensor share it."""
    found = _wholes(directory, MODEL)
    return found | {name: found[stored] for name, stored in _ties(directory).items() if stored in found}


def _wholes(directory: Path, of: str) -> dict[str, torch.Tensor]:
    targets = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in _sizes(directory, of).items()}
    _read(targets, directory, of)
    return targets


def convert(checkpoint: Path, target: Path) -> list[str]:
    """Write `checkpoint` anew as `target`, a checkpoint with whole tensors in the usual files; the files it holds.

    It is verified before, and `target` is there whole, with a manifest, or not at all. Raises ValueError for a
    checkpoint that is damaged, or not in parts, and FileExistsError where `target` is something already.
    """
    from trainwright.checkpoint.manifest import problems, read_manifest
    from trainwright.checkpoint.save import staged
    from trainwright.checkpoint.weights import save_tensors

    found = problems(checkpoint)
    if found:
        raise ValueError(f"{os.fspath(checkpoint)} is damaged: {'; '.join(found)}.")
    manifest = read_manifest(checkpoint)
    if manifest is None or not (has_parts(checkpoint, MODEL) or has_parts(checkpoint, OPTIMIZER)):
        raise ValueError(f"{os.fspath(checkpoint)} holds no {FOLDER}/ of this Trainer: there is nothing to convert.")
    if os.path.lexists(target):
        raise FileExistsError(f"{os.fspath(target)} exists: name a directory that does not.")
    with staged(target, step=manifest.step, world_size=manifest.world_size, position=manifest.position) as directory:
        for name in manifest.files:
            if not name.startswith(f"{FOLDER}/"):
                path = os.path.join(directory, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                shutil.copyfile(inside(checkpoint, name), path)
        if has_parts(checkpoint, MODEL) and not _has_weights(manifest.files):
            save_tensors(whole_model(checkpoint), directory)
        if has_parts(checkpoint, OPTIMIZER):
            state = load_tensors(inside(checkpoint, names.OPTIMIZER_NAME), mmap=False)
            for name, tensor in _wholes(checkpoint, OPTIMIZER).items():
                number, _, key = name.partition(".")
                state["state"].setdefault(int(number), {})[key] = tensor
            torch.save(state, os.path.join(directory, names.OPTIMIZER_NAME))
    return sorted(os.listdir(target))


def _has_weights(files: Iterable[str]) -> bool:
    return names.SAFE_WEIGHTS_NAME in files or names.SAFE_WEIGHTS_INDEX_NAME in files
