"""Checkpoints that other implementations wrote, whole and damaged."""

import os
import shutil
from pathlib import Path

import pytest

from trainwright.checkpoint.manifest import problems

FIXTURES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
RELEASES = sorted(path.name for path in FIXTURES.iterdir())
FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]


@pytest.fixture(params=RELEASES)
def checkpoint(request, tmp_path):
    return Path(shutil.copytree(FIXTURES / request.param / "checkpoint-2", tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_each_release_is_whole(checkpoint):
    assert problems(checkpoint) == []
    assert problems(checkpoint, deep=False) == []


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_emptied_file_is_named(checkpoint, name):
    content = (checkpoint / name).read_bytes()
    for short in (content[: len(content) // 2], b""):
        (checkpoint / name).write_bytes(short)
        assert len(problems(checkpoint)) == 1 and problems(checkpoint)[0].startswith(name)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_flipped_bit_in_a_torch_file_is_found_by_its_checksum(checkpoint, name):
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1  # inside a tensor
    (checkpoint / name).write_bytes(content)
    assert len(problems(checkpoint)) == 1 and problems(checkpoint)[0].startswith(f"{name} is damaged")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    assert len(problems(checkpoint)) == 1 and name in problems(checkpoint)[0] and "missing" in problems(checkpoint)[0]


def test_a_checkpoint_of_weights_alone_is_whole(checkpoint):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    assert problems(checkpoint) == []


def test_an_index_that_names_an_absent_or_outside_shard_is_found(checkpoint, tmp_path):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    assert problems(checkpoint) == [f"model-1.safetensors is missing, though {index.name} names it"]
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "outside.safetensors")
    index.write_text('{"weight_map": {"w": "../outside.safetensors"}}')
    assert "not a plain name" in problems(checkpoint)[0]
    index.write_text('{"weight_map": []}')
    assert problems(checkpoint) == [f"{index.name} is damaged: it has no weight_map"]


def test_a_link_in_place_of_a_file_is_found(checkpoint, tmp_path):
    os.rename(checkpoint / "optimizer.pt", tmp_path / "optimizer.pt")
    os.symlink(tmp_path / "optimizer.pt", checkpoint / "optimizer.pt")
    assert len(problems(checkpoint)) == 1 and "is a link" in problems(checkpoint)[0]
