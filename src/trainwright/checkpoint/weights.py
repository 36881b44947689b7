"""The weights of a model, in a directory: written, read back, and what did not match.

Owns: safetensors and torch files, single or in shards, adapters, tensors shared by several names.
Leaves to others: everything else in a checkpoint. `transformers` and peft models write themselves.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from trainwright import names, shards
from trainwright.checkpoint import sharded, sink
from trainwright.checkpoint.paths import MAX_NAMED, inside, named, read_json, shown
from trainwright.checkpoint.tensors import load_tensors
from trainwright.interop.loaded import is_peft_model, is_pretrained_model

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]
Tensors = dict[str, torch.Tensor]

# What every release of safetensors knows.
_HELD_BY_ALL = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)
_FORMAT = {"format": "pt"}  # other tools read it to know which framework wrote the file


class LoadResult(NamedTuple):
    """Names that did not match, in the shape that `nn.Module.load_state_dict` returns."""

    missing_keys: list[str]  # in the model, not in the files; it keeps the values it had
    unexpected_keys: list[str]  # in the files, not in the model; ignored


def save_weights(
    model: nn.Module,
    directory: Path,
    state_dict: Tensors | None = None,
    safe: bool = True,
    max_shard_size_gb: float = 50,
) -> None:
    """Write the weights of `model` (or `state_dict`, where they were gathered elsewhere) to `directory`.

    `safe` chooses safetensors over `torch.save`; a file larger than `max_shard_size_gb` (10^9 bytes) is split, with an
    index. Raises ValueError, before anything is written, for a state dict that safetensors cannot hold.
    """
    if safe:
        check_can_be_held(model, state_dict)
    os.makedirs(directory, exist_ok=True)
    writes_itself = is_pretrained_model(model) or is_peft_model(model)
    if writes_itself and _save_pretrained(model, directory, state_dict, safe, max_shard_size_gb):
        return
    tensors = model.state_dict() if state_dict is None else state_dict
    if not safe:
        path = os.path.join(directory, names.WEIGHTS_NAME)
        sink.write("torch", path, tensors)
        return
    save_tensors(tensors, directory, model, max_shard_size_gb)


def save_tensors(
    tensors: Tensors, directory: Path, model: nn.Module | None = None, max_shard_size_gb: float = 50
) -> None:
    """Write a state dict to safetensors files in `directory`, as `save_weights` does. `model`: whose it is."""
    unique, aliases = _without_duplicates(tensors)
    shards = _split(unique, max_shard_size_gb * 1e9)
    weight_map: dict[str, str] = {}
    files, owner = sink.of(directory), model if model is not None else nn.Module()
    for index, shard in enumerate(shards, start=1):
        name = names.SAFE_WEIGHTS_NAME if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        in_shard = {alias: kept for alias, kept in aliases.items() if kept in shard}
        files.write_weights(owner, shard, os.path.join(directory, name), _FORMAT | in_shard)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index_content = {"metadata": {"total_size": sum(t.nbytes for t in unique.values())}, "weight_map": weight_map}
        with open(os.path.join(directory, names.SAFE_WEIGHTS_INDEX_NAME), "w", encoding="utf-8") as file:
            json.dump(index_content, file, indent=2, sort_keys=True)


def check_can_be_held(model: nn.Module, state_dict: Tensors | None = None) -> None:
    """Raise ValueError, naming each with the reason, where the weights of `model` (or `state_dict`) hold something that
    safetensors has no place for. Adapters are not looked at: peft chooses what it saves.
    """
    if is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False):
        return
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    entries = model.state_dict() if state_dict is None else state_dict
    reasons = {
        name: _no_place_for(value)
        for name, value in entries.items()
        if name not in ignored
        and (
            type(value) is not torch.Tensor
            or value.layout is not torch.strided
            or value.is_nested
            or value.dtype not in _HELD_BY_ALL
        )  # else it is a usual one
    }
    found = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    if found:
        raise ValueError(
            f"safetensors cannot hold what the state dict of {type(model).__name__} has: {named(found, 3)}. Set "
            "save_safetensors=False to write the weights with torch.save, or, where it need not be saved, register the "
            "buffer with persistent=False."
        )


def _no_place_for(value: Any) -> str:
    """Why safetensors cannot hold `value`; "" where it can."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.is_nested:
        return "a nested tensor"
    if value.layout is not torch.strided:
        return f"layout {value.layout}"
    if value.is_quantized:
        return f"quantized, {value.dtype}"
    return "" if _has_type(value.dtype) else f"dtype {value.dtype}"


@functools.cache
def _has_type(dtype: torch.dtype) -> bool:
    """Whether the installed safetensors knows a dtype: each release knows a few more."""
    try:
        save({"x": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError, SafetensorError):
        return False
    return True


def load_state_dict(model: nn.Module, tensors: Tensors) -> LoadResult:
    """`model.load_state_dict`, not strict, also into buffers made by `expand`, many of whose elements are one number,
    so that torch does not write to them, and into nested ones.
    """
    entries = model.state_dict(keep_vars=True)
    done = {name for name, value in tensors.items() if name in entries and _written(entries[name], value)}
    parts = {k: shards.divided_as(entries.get(k), v) for k, v in tensors.items() if k not in done}
    result = model.load_state_dict(parts, strict=False)
    return LoadResult([name for name in result.missing_keys if name not in done], list(result.unexpected_keys))


def _written(target: Any, value: Any) -> bool:
    """Whether `target` now holds `value`: one that repeats its elements, as `value` does, or is nested."""
    if not (isinstance(target, torch.Tensor) and isinstance(value, torch.Tensor)):
        return False
    if target.is_nested and value.is_nested:  # load_state_dict asks for a shape, which it does not have
        target.detach().copy_(value)
        return True
    if target.is_nested or target.layout is not torch.strided or target.shape != value.shape:
        return False
    once, one = target.detach(), value
    for dim in range(target.dim()):
        if target.size(dim) > 1 and target.stride(dim) == 0:
            once, one = once.narrow(dim, 0, 1), one.narrow(dim, 0, 1)
    if once.shape == target.shape or not torch.equal(one.expand_as(value), value):
        return False  # where the numbers differ, torch's own error names the buffer
    once.copy_(one)
    return True


def load_weights(model: nn.Module, directory: Path, strict: bool = False, prefer_safe: bool = True) -> LoadResult:
    """Load what `directory` holds into `model`, whichever of the documented files it is. No code in a file is run.

    Shards are read one at a time. A name that shares its tensor with a loaded one is not missing. With `strict`, names
    that do not match raise RuntimeError. Raises FileNotFoundError without weights, ValueError for a damaged file or an
    index that leads outside, RuntimeError for another shape or where no name matches.
    """
    # A `transformers` model may also carry an adapter itself (`model.add_adapter`), and then saves only that.
    if is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False):
        result = _load_adapters(model, directory)
    else:
        files = weight_files(directory, prefer_safe)
        if not files:
            missing, unexpected = sharded.load_model_parts(model, directory)
            result = LoadResult(missing, unexpected)
        else:
            result = _load_files(model, files)
        if files and is_pretrained_model(model) and (result.missing_keys or result.unexpected_keys):
            # The library may write other names than the model has (fused experts, renamed modules).
            tensors = {name: tensor for path in files for name, tensor in _read(path).items()}
            converted = _load_converted(model, tensors)
            if converted is not None:
                result = LoadResult(_without_tied(model, converted[0]), converted[1])
    if result.unexpected_keys and set(model.state_dict()) <= set(result.missing_keys):
        raise RuntimeError(
            f"The weights in {os.fspath(directory)} belong to another model than {type(model).__name__}: no name is "
            f"the same. They are called {named(result.unexpected_keys, 3)}, "
            f"the model's {named(result.missing_keys, 3)}."
        )
    if strict and (result.missing_keys or result.unexpected_keys):
        raise RuntimeError(
            f"The weights in {os.fspath(directory)} do not match {type(model).__name__}. "
            f"Missing: {_quoted(result.missing_keys)}. Unexpected: {_quoted(result.unexpected_keys)}."
        )
    return result


def _quoted(names_: list[str]) -> str:
    """As a list, of which a file with very many names prints only the first."""
    first = [shown(name) for name in names_[:MAX_NAMED]]
    return f"{first}" + (f" and {len(names_) - MAX_NAMED:,} more" if len(names_) > MAX_NAMED else "")


def load_sharded_checkpoint(
    model: nn.Module, folder: Path, strict: bool = True, prefer_safe: bool = True
) -> LoadResult:
    """Load weights that an index splits over several files; as `load_weights`, but the index must be there."""
    indexes = (names.SAFE_WEIGHTS_INDEX_NAME, names.WEIGHTS_INDEX_NAME)
    if not any(os.path.isfile(os.path.join(folder, name)) for name in indexes):
        raise ValueError(f"{os.fspath(folder)} holds no index of shards ({' or '.join(indexes)}).")
    return load_weights(model, folder, strict, prefer_safe)


def issue_warnings_after_load(result: LoadResult, model: nn.Module) -> None:
    """Say in one warning each which names were missing and which were not used."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    missing = [name for name in result.missing_keys if name not in ignored]
    if missing:
        logger.warning(
            "These weights were missing in the checkpoint and keep the values they had: %s.", _quoted(missing)
        )
    if result.unexpected_keys:
        logger.warning(
            "These weights of the checkpoint have no place in the model: %s.", _quoted(result.unexpected_keys)
        )


def weight_files(directory: Path, prefer_safe: bool = True) -> list[str]:
    """The files that hold the weights of `directory`: one, or the shards its index names. None of them where each
    process of a run wrote its part (`sharded.py`).
    """
    safe = [names.SAFE_WEIGHTS_NAME, names.SAFE_WEIGHTS_INDEX_NAME]
    pickled = [names.WEIGHTS_NAME, names.WEIGHTS_INDEX_NAME]
    candidates = safe + pickled if prefer_safe else pickled + safe
    found = next((name for name in candidates if os.path.isfile(os.path.join(directory, name))), None)
    if found is None and sharded.has_parts(directory, sharded.MODEL):
        return []
    if found is None:
        raise FileNotFoundError(f"{os.fspath(directory)} holds no weights: none of {', '.join(candidates)} is there.")
    path = os.path.join(directory, found)
    if not found.endswith(".index.json"):
        return [path]
    try:
        weight_map = read_json(path)["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError("a name is no text")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: it has no weight_map. Use an older checkpoint.") from error
    return [inside(directory, shard) for shard in shards]


def _save_pretrained(
    model: Any, directory: Path, state_dict: Tensors | None, safe: bool, max_shard_size_gb: float
) -> bool:
    """Have the model write itself; False when its release writes only safetensors and something else was asked for."""
    options: dict[str, Any] = {"state_dict": state_dict}
    if "max_shard_size" in inspect.signature(model.save_pretrained).parameters:
        options["max_shard_size"] = int(max_shard_size_gb * 1e9)
    if "safe_serialization" in inspect.signature(model.save_pretrained).parameters:
        options["safe_serialization"] = safe
    elif not safe:
        save_config(model, directory)
        return False
    if "save_embedding_layers" in inspect.signature(model.save_pretrained).parameters and not _has_embeddings(model):
        options["save_embedding_layers"] = False  # where the vocabulary is another, peft asks a speech model for them
    with sink.no_progress_bars(), sink.redirected(model, directory), _not_divided(model, state_dict):
        model.save_pretrained(directory, **options)
    return True


def _has_embeddings(model: Any) -> bool:
    try:
        return model.get_input_embeddings() is not None
    except (AttributeError, NotImplementedError):
        return False


@contextmanager
def _not_divided(model: Any, whole: Tensors | None) -> Iterator[None]:
    """Have a model that is divided over processes write the tensors in `whole`: it would gather them once more, for
    which it waits for processes that do not write.
    """
    config = getattr(model, "config", None)
    divided = [(model, "_tp_size"), (config, "distributed_config")]
    hidden = [(owner, name, value) for owner, name in divided if (value := getattr(owner, name, None)) is not None]
    if whole is None:
        hidden = []
    try:
        for owner, name, _ in hidden:
            setattr(owner, name, None)
        yield
    finally:
        for owner, name, value in hidden:
            setattr(owner, name, value)


def save_config(model: Any, directory: Path) -> None:
    """The small files of a `transformers` model, without its weights; of any other nothing."""
    if not is_pretrained_model(model):
        return
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # what `fully_shard` adds to a class
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def _without_duplicates(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Tensors to write, and `{name left out: name of the same tensor}`; parts of one memory block are copied apart."""
    unique: Tensors = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    blocks: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        block = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if block and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        overlaps = block in blocks or (block and tensor.untyped_storage().nbytes() != tensor.nbytes)
        blocks.add(block)
        unique[name] = tensor.clone(memory_format=torch.contiguous_format) if overlaps else tensor.contiguous()
    return unique, aliases


def _split(tensors: Tensors, limit_bytes: float) -> list[Tensors]:
    """Group tensors, in order, into shards of at most `limit_bytes` each; a larger tensor has one to itself."""
    shards: list[Tensors] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _read(path: str) -> Tensors:
    """Every tensor of one file, mapped, under all of its names."""
    if not path.endswith(".safetensors"):
        tensors = load_tensors(path)
        if not isinstance(tensors, dict):
            raise ValueError(f"{path} holds a {type(tensors).__name__}, not a state dict.")
        return tensors
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {shown(error, 300)}. Use an older checkpoint.") from error
    return tensors | {
        alias: tensors[kept] for alias, kept in metadata.items() if alias not in _FORMAT and kept in tensors
    }


def _load_files(model: nn.Module, files: list[str]) -> LoadResult:
    missing: set[str] | None = None
    unexpected: list[str] = []
    for path in files:
        try:
            result = load_state_dict(model, _read(path))
        except RuntimeError as error:
            raise RuntimeError(f"{path} does not fit {type(model).__name__}: {error}") from error
        missing = set(result.missing_keys) if missing is None else missing.intersection(result.missing_keys)
        unexpected += result.unexpected_keys
    return LoadResult(_without_tied(model, sorted(missing or ())), unexpected)


def _without_tied(model: nn.Module, missing: list[str]) -> list[str]:
    """Those of `missing` whose tensor is not also there under a name that was loaded."""
    if not missing:
        return missing
    entries = model.state_dict(keep_vars=True)
    loaded = {id(value) for name, value in entries.items() if name not in missing}
    return [name for name in missing if id(entries.get(name)) not in loaded]


def _load_converted(model: Any, tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[str]] | None:
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


def _load_adapters(model: Any, directory: Path) -> LoadResult:
    """Load each adapter of a model. "default" is in `directory`, every other in a folder of that name.

    A model that carries its adapter without a wrapper saves the active one in `directory`, under the wrapper's names.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wrapped = is_peft_model(model)
    missing: list[str] = []
    unexpected: list[str] = []
    for adapter in model.peft_config if wrapped else model.active_adapters()[:1]:
        folder = os.path.join(directory, adapter) if wrapped and adapter != "default" else os.fspath(directory)
        candidates = (names.ADAPTER_SAFE_WEIGHTS_NAME, names.ADAPTER_WEIGHTS_NAME)
        path = next((p for p in (os.path.join(folder, name) for name in candidates) if os.path.isfile(p)), None)
        if path is None:
            raise FileNotFoundError(f"{folder} holds no weights of the adapter {adapter!r}: {' or '.join(candidates)}.")
        tensors = _read(path)
        if not wrapped:
            tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        expected = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        parts = {name: shards.divided_as(expected.get(name), tensor) for name, tensor in tensors.items()}
        result: Any = set_peft_model_state_dict(model, parts, adapter_name=adapter)  # it renames them
        missing += [name for name in expected if name not in tensors]
        # peft calls a prompt's embeddings unexpected, though it has loaded them.
        unexpected += [name for name in result.unexpected_keys if name not in expected]
    return LoadResult(missing, unexpected)
