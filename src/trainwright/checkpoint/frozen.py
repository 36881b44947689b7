"""Weights that training does not change: the first checkpoint of a run writes them, later ones link to that file.

Owns: which files of a checkpoint hold only frozen weights, comparing these with what an earlier checkpoint of the run
holds, the link. Leaves to others: writing what was not linked (weights.py, writer.py), the manifest that promises it.
Why, and what it costs: docs/decisions/0006-frozen-weights.md.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from typing import Any

import torch
from torch import nn

from trainwright.checkpoint.manifest import read_manifest
from trainwright.checkpoint.paths import inside
from trainwright.checkpoint.sink import Tensors, WeightsFile
from trainwright.interop.loaded import is_peft_model
from trainwright.names import MANIFEST_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from trainwright.nested import strided_parts

logger = logging.getLogger(__name__)

# Below these, one file that every tool knows is worth more than what two save: less than half of the weights, or less
# than an ordinary disk writes, and a core hashes, in a tenth of a second.
LEAST_SHARE = 0.5
LEAST_BYTES = 32 << 20

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_FORMAT = "format"  # a key of a safetensors file's metadata; the others of ours are names of shared tensors
_ROW_WORDS = 1024  # of 8 bytes


class FrozenWeights:
    """Of one Trainer: the checkpoints that it wrote, whose frozen weights the next may link to.

    `is_on`: whether it may (`save_frozen_weights="once"`). A run that was resumed links to none from before.
    """

    def __init__(self, *, is_on: bool = True) -> None:
        self.is_on = is_on
        self._written: list[str] = []

    def num_bytes_shared(self, model: nn.Module) -> int:
        """How much of each checkpoint of `model` will be that of the first, as far as can be said before it."""
        if not self.is_on or is_peft_model(model):  # of that only what is trained is saved
            return 0
        tensors = {name: one for name, one in model.state_dict().items() if isinstance(one, torch.Tensor)}
        frozen = _num_bytes(_frozen_part(model, tensors))
        return frozen if _is_worth_it(frozen, _num_bytes(tensors)) else 0

    def files_of(self, staging: str, final: str) -> FrozenFiles | None:
        """Those of the checkpoint `final`, which is written into `staging`; None where checkpoints share no weights."""
        if not self.is_on:
            return None
        run_dir = os.path.dirname(final)  # not those of another trial
        self._written = [path for path in self._written if os.path.isdir(path) and path != final]
        return FrozenFiles(staging, [path for path in self._written if os.path.dirname(path) == run_dir])

    def note(self, final: str, files: FrozenFiles) -> None:
        """All of `final` is written, or handed to the background writer: the next checkpoint may link to it."""
        if files.entries:
            self._written.append(final)


class FrozenFiles:
    """The frozen files of one checkpoint. `entries`: what its manifest says of them; of a file that is still to be
    written only the fingerprint ("frozen"). `linked`: the tensors that are in an earlier checkpoint, bit for bit.
    """

    def __init__(self, staging: str, earlier: list[str]) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.linked: list[torch.Tensor] = []
        self._staging, self._earlier = staging, earlier

    def left_to_write(self, model: nn.Module, file: WeightsFile) -> list[WeightsFile]:
        """What is to be written of a file with weights of `model`: itself, or one or both of the two that it becomes.

        A single file of weights is divided, with an index; one of several shards stays as it is.
        """
        folder, name = os.path.split(os.path.abspath(file.path))
        num_bytes = _num_bytes(file.tensors)
        if folder != self._staging or num_bytes < LEAST_BYTES:
            return [file]
        frozen = _frozen_part(model, file.tensors)
        num_frozen = _num_bytes(frozen)
        if not frozen or num_frozen < LEAST_BYTES:
            return [file]
        if len(frozen) == len(file.tensors) and _SHARD.fullmatch(name):
            return self._unless_linked(file)
        if name != SAFE_WEIGHTS_NAME or not _is_worth_it(num_frozen, num_bytes):
            return [file]
        trained = {name: tensor for name, tensor in file.tensors.items() if name not in frozen}
        parts = [
            WeightsFile(
                os.path.join(folder, f"model-{number:05d}-of-{1 + bool(trained):05d}.safetensors"),
                part,
                {key: value for key, value in (file.metadata or {}).items() if key == _FORMAT or value not in rest},
            )
            for number, (part, rest) in enumerate(((frozen, trained), (trained, frozen)), start=1)
            if part
        ]
        weight_map = {name: os.path.basename(part.path) for part in parts for name in part.tensors}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        with open(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME), "w", encoding="utf-8") as text:
            json.dump(index, text, indent=2, sort_keys=True)
        return self._unless_linked(parts[0]) + parts[1:]

    def _unless_linked(self, file: WeightsFile) -> list[WeightsFile]:
        name = os.path.basename(file.path)
        fingerprint = _fingerprint(file)
        self.entries[name] = {"frozen": fingerprint}
        for checkpoint in reversed(self._earlier):
            entry = _promised(checkpoint, name, fingerprint)
            if entry is None:
                continue
            try:
                os.link(os.path.join(checkpoint, name), file.path)
            except OSError as error:  # file systems without links, or with too many to this file
                logger.info("%s cannot be linked to that of %s and is written again: %s.", name, checkpoint, error)
                break
            self.entries[name] = entry
            self.linked += file.tensors.values()
            return []
        return [file]


def _is_worth_it(num_frozen: int, num_bytes: int) -> bool:
    """Whether so many bytes out of `num_bytes` are worth a separate file."""
    return num_frozen >= max(LEAST_BYTES, LEAST_SHARE * num_bytes)


def _frozen_part(model: nn.Module, tensors: Tensors) -> Tensors:
    """Those of `tensors` that are frozen parameters and share their memory with none that is trained.

    Only an expectation: whether they are as they were is asked of their bytes.
    """
    frozen: set[tuple[torch.device, int]] = set()
    trained: set[tuple[torch.device, int]] = set()
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.layout is torch.strided and not parameter.is_meta:
            (trained if parameter.requires_grad else frozen).add(_memory(parameter))
    frozen -= trained
    return {
        name: tensor
        for name, tensor in tensors.items()
        if type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.numel()
        and _memory(tensor) in frozen
    }


def _memory(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _num_bytes(tensors: Tensors) -> int:
    return sum(part.nbytes for tensor in tensors.values() for part in strided_parts(tensor))


def _promised(checkpoint: str, name: str, fingerprint: str) -> dict[str, Any] | None:
    """What the manifest of `checkpoint` says of its file `name`, if that holds tensors of `fingerprint` and was not
    written to since; else None.
    """
    try:
        manifest = read_manifest(checkpoint)
        entry: dict[str, Any] = manifest.files[name] if manifest is not None else {}
        status = os.stat(inside(checkpoint, name))
        promised_at_ns = os.stat(os.path.join(checkpoint, MANIFEST_NAME)).st_mtime_ns
    except (OSError, ValueError, KeyError):
        return None
    is_as_promised = status.st_size == entry.get("size") and status.st_mtime_ns <= promised_at_ns
    return entry if is_as_promised and entry.get("frozen") == fingerprint else None


def _fingerprint(file: WeightsFile) -> str:
    """A hash over names, types, shapes and sums of all bytes, from which no change of a weight escapes by accident.

    Counters of versions and addresses would cost nothing, but `parameter.data` goes round them, and that is how a
    momentum encoder is updated. Cost: two passes over the memory, less than copying it; one read per device.
    """
    described = [(name, str(one.dtype), tuple(one.shape)) for name, one in file.tensors.items()]
    digest = hashlib.sha256(repr((described, sorted((file.metadata or {}).items()))).encode())
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in file.tensors.values():
        sums.setdefault(tensor.device, []).extend(_sums(tensor.detach()))
    for parts in sums.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Its bytes as words of 8 in rows, summed along and across (each (n,), int64, wrapping): a number that changes or
    moves changes both. What fills no row is not summed.
    """
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if flat.data_ptr() % 8 or flat.storage_offset() % 8:
        flat = flat.clone()
    num_words = len(flat) // 8
    words = flat[: num_words * 8].view(torch.int64)
    num_rows = num_words // _ROW_WORDS
    rows = words[: num_rows * _ROW_WORDS].view(num_rows, _ROW_WORDS)
    return [rows.sum(0), rows.sum(1), words[num_rows * _ROW_WORDS :], flat[num_words * 8 :].to(torch.int64)]
