"""Sounds of a few tones, and tiny speech models that are new, saved as a user would have them."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RATE = 4000  # Hz
PITCHES = {"high": 900, "low": 200}
TUNE = (150, 300, 600, 1200)  # of which pretraining hears several: in a single tone all steps would be the same
# The values of a wav2vec 2.0 of one small layer, as in a file of `trainwright train`.
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": [16, 16],
    "conv_kernel": [20, 8], "conv_stride": [10, 8], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2, "classifier_proj_size": 16, "apply_spec_augment": False,
    "num_codevectors_per_group": 4, "codevector_dim": 16, "proj_codevector_dim": 16, "num_negatives": 5,
    "diversity_loss_weight": 0.1,
}  # fmt: skip


def write_tone(
    path: Path, pitches: Sequence[float], rate: int = RATE, seconds: float = 0.25, channels: int = 1, width: int = 2
) -> None:
    """A WAV file of tones one after the other, with a little noise."""
    time = np.arange(round(rate * seconds)) / rate
    sound = np.concatenate([0.5 * np.sin(2 * np.pi * pitch * time) for pitch in pitches])
    sound += np.random.default_rng(len(str(path))).normal(0, 0.01, len(sound))
    samples = np.repeat((sound * (2 ** (8 * width - 1) - 1)).astype(f"<i{width}"), channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def write_words(directory: Path, number: int) -> Path:
    """A jsonl of `number` recordings, in `directory`, of one or two words with their texts; a word is a tone."""
    lines = []
    for index in range(number):
        name = list(PITCHES)[index % 2]
        words = [name] if index % 4 < 2 else [name, "high"]
        write_tone(directory / "words" / f"{index}.wav", [PITCHES[word] for word in words])
        lines.append({"audio": f"words/{index}.wav", "text": " ".join(words).upper() + "!"})
    path = directory / "words.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def write_tunes(directory: Path, number: int) -> Path:
    draw = np.random.default_rng(0)
    for index in range(number):
        write_tone(directory / f"{index}.wav", draw.choice(TUNE, 8).tolist(), seconds=0.08)
    return directory


def save_extractor(directory: Path) -> Path:
    from transformers import Wav2Vec2FeatureExtractor

    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=False).save_pretrained(directory)
    return directory


def save_wav2vec2(directory: Path, kind: str = "Wav2Vec2Model", **values: Any) -> Path:
    """A wav2vec 2.0 with random weights and its feature extractor, in `directory`. `kind`: its class."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**{**SMALL, **values})
    getattr(transformers, kind)(config).save_pretrained(directory)
    return save_extractor(directory)
