"""Sound: read as float32 at one sampling rate, when a batch is made.

Owns: reading with errors that name the row, resampling, `AudioRows`, padded batches. Leaves to others: features (the
model's own extractor). WAV files need nothing but NumPy and SciPy; other kinds need the package soundfile.
"""

from __future__ import annotations

import io
import os
import wave
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import numpy as np
import torch

from trainwright.interop.optional import is_installed
from trainwright.tasks.checks import shared_column
from trainwright.tasks.errors import DataError, package
from trainwright.tasks.images import relative_to_file
from trainwright.tasks.sources import Split

Array = np.ndarray[Any, Any]
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


def read_audio(cell: Any, split: Split, index: int, sampling_rate: int) -> Array:
    """One channel of float32 in [-1, 1] at `sampling_rate` (Hz), (samples,), from a path, bytes, {"bytes", "path"} or
    {"array", "sampling_rate"}. Several channels are averaged. Raises DataError naming the row.
    """
    try:
        if isinstance(cell, dict) and "array" in cell:
            return resampled(np.asarray(cell["array"], np.float32), int(cell["sampling_rate"]), sampling_rate)
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell.get("bytes") is not None else cell["path"]
        source = io.BytesIO(cell) if isinstance(cell, bytes) else relative_to_file(os.fspath(cell), split)
        sound, rate = _decoded(source)
    except (OSError, EOFError, wave.Error, ValueError, TypeError, KeyError, RuntimeError) as error:
        shown = cell if isinstance(cell, str) else type(cell).__name__
        raise DataError(f"{split.place(index)}: no sound can be read from {shown!r}: {error}.") from error
    if len(sound) == 0:
        raise DataError(f"{split.place(index)}: the sound has no samples. Remove the row.")
    return resampled(sound, rate, sampling_rate)


def _decoded(source: Any) -> tuple[Array, int]:
    """(float32 (samples,), its rate) of a file or of bytes."""
    if is_installed("soundfile"):
        frames, rate = package("soundfile").read(source, dtype="float32", always_2d=True)
        return frames.mean(1), int(rate)
    with wave.open(source) as file:  # PCM of 1 to 4 bytes a sample
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = file.readframes(file.getnframes())
    if width == 1:  # unsigned
        numbers = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        padded = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        whole = np.concatenate([np.zeros((len(padded), 1), np.uint8), padded], axis=1).reshape(-1).view("<i4")
        numbers = whole.astype(np.float32) / 2**31
    else:
        numbers = np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    return numbers.reshape(-1, channels).mean(1), rate


def resampled(sound: Array, rate: int, wanted: int) -> Array:
    """`sound` (samples,) at `wanted` Hz, filtered so that no tone folds back."""
    if rate == wanted:
        return sound
    signal = package("scipy.signal")
    step = gcd(rate, wanted)
    return signal.resample_poly(sound, wanted // step, rate // step).astype(np.float32)  # type: ignore[no-any-return]


def sound_column(splits: dict[str, Split], given: str | None) -> str:
    """The column of the sounds: `given` (audio_column), else audio, file or path. DataError where a part has none."""
    return shared_column(splits.values(), "audio_column", given, ("audio", "file", "path"), "the sound")


def freeze_feature_encoder(model: Any) -> None:
    """Leave the first, convolutional layers of a model that has such (as wav2vec 2.0 does) as they are."""
    if hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()


class AudioRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows whose sound is read when asked for, cut by `cut`; `extra`: what else each sample holds."""

    def __init__(
        self,
        split: Split,
        column: str,
        sampling_rate: int,
        extra: Sequence[dict[str, Any]] | None = None,
        cut: Callable[[Array], Array] | None = None,
    ) -> None:
        self.split, self.column, self.sampling_rate = split.undecoded(column), column, sampling_rate
        self.extra, self.cut = extra, cut

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cell = self.split.rows[int(index)][self.column]
        sound = read_audio(cell, self.split, int(index), self.sampling_rate)
        if self.cut is not None:
            sound = self.cut(sound)
        return {"sound": sound, **(self.extra[int(index)] if self.extra is not None else {})}


class SoundCollator:
    """Batches of {"sound": (samples,), ...}: what the extractor makes of the sounds, padded, and "labels" where given.

    Labels of several tokens are padded with -100, by `pad_labels`, a tokenizer's `pad`.
    """

    def __init__(self, extractor: Any, pad_labels: Callable[..., Any] | None = None) -> None:
        self.extractor, self.pad_labels = extractor, pad_labels

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rate = self.extractor.sampling_rate
        padding = "max_length" if hasattr(self.extractor, "nb_max_frames") else True  # Whisper hears 30 s, always
        options = {"return_attention_mask": True} if getattr(self.extractor, "return_attention_mask", False) else {}
        batch = self.extractor(
            [row["sound"] for row in rows], sampling_rate=rate, padding=padding, return_tensors="pt", **options
        )
        found = {name: batch[name] for name in batch}
        if "labels" not in rows[0]:
            return found
        if self.pad_labels is None:
            return {**found, "labels": torch.tensor([row["labels"] for row in rows])}
        padded = self.pad_labels([{"input_ids": row["labels"]} for row in rows], padding=True, return_tensors="pt")
        return {**found, "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)}


def random_part(seconds: float, sampling_rate: int) -> Callable[[Array], Array]:
    """A function that cuts a random part of at most `seconds` out of a sound, by torch's generator."""
    length = round(seconds * sampling_rate)

    def cut(sound: Array) -> Array:
        if len(sound) <= length:
            return sound
        start = int(torch.randint(len(sound) - length + 1, ()))
        return sound[start : start + length]

    return cut
