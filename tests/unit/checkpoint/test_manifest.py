"""A manifest finds every kind of damage and names the file."""

import hashlib
import json
import os
import shutil

import pytest
import torch

from trainwright.checkpoint.manifest import HASH_BLOCK_BYTES, problems, read_manifest, sha256_of, write_manifest
from trainwright.checkpoint.save import save_rng

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "loop_state.json"]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-3"
    (folder / "other_adapter").mkdir(parents=True)
    for name in [*FILES, "other_adapter/adapter_model.safetensors"]:
        (folder / name).write_bytes(os.urandom(200))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    loop = {"position": {"epoch": 0, "samples_in_epoch": 48}, "window": {"sum": 0.0, "num_losses": 0}}
    (folder / "loop_state.json").write_text(json.dumps(loop | {"total_loss": 1.5, "last_logged_step": 3}))
    torch.save({"last_epoch": 3}, folder / "scheduler.pt")
    save_rng(folder)
    write_manifest(folder, 3, 2, {"samples": 48})
    return folder


def test_a_manifest_comes_back_as_it_was_written(checkpoint):
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.world_size, manifest.position) == (3, 2, {"samples": 48})
    assert set(manifest.files) == {*FILES, "other_adapter/adapter_model.safetensors"}
    content = (checkpoint / "optimizer.pt").read_bytes()
    assert manifest.files["optimizer.pt"] == {"size": 200, "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest.writer.startswith("trainwright")
    assert problems(checkpoint) == []


def test_a_directory_without_manifest_has_none(tmp_path):
    assert read_manifest(tmp_path) is None


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "grown":
        path.write_bytes(content + b"\0")
    elif how == "changed":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "grown", "changed"])
@pytest.mark.parametrize("name", [*FILES, "other_adapter/adapter_model.safetensors"])
def test_each_damaged_file_is_named_with_its_damage(checkpoint, name, how):
    damage(checkpoint / name, how)
    found = problems(checkpoint)
    assert len(found) == 1 and found[0].startswith(f"{name} ") and how in found[0]


def test_sizes_alone_are_compared_when_the_check_is_shallow(checkpoint):
    damage(checkpoint / "optimizer.pt", "changed")
    assert problems(checkpoint, deep=False) == []
    damage(checkpoint / "optimizer.pt", "truncated")
    assert problems(checkpoint, deep=False) == ["optimizer.pt is truncated: 199 of 200 bytes"]


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "changed"])
def test_a_damaged_manifest_is_found(checkpoint, how):
    if how == "truncated":  # the last byte is only a line end
        damage(checkpoint / "manifest.json", how)
    damage(checkpoint / "manifest.json", how)
    assert len(problems(checkpoint)) == 1 and "manifest.json" in problems(checkpoint)[0]


def test_a_changed_position_in_the_manifest_is_found(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 48', '"samples": 49'))
    assert "its own checksum does not match" in problems(checkpoint)[0]


def test_a_manifest_of_a_later_format_asks_for_an_upgrade(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    assert "Upgrade trainwright" in problems(checkpoint)[0]


def test_a_state_file_that_nobody_promised_is_found_and_a_note_is_not(checkpoint):
    (checkpoint / "README.md").write_text("a note")
    assert problems(checkpoint) == []
    (checkpoint / "rng_state_7.pth").write_bytes(b"x")
    assert problems(checkpoint) == [
        "rng_state_7.pth is not in the manifest, so it was added after the checkpoint was written"
    ]


def test_a_link_in_place_of_a_file_is_found_even_with_the_same_content(checkpoint, tmp_path):
    shutil.copy(checkpoint / "optimizer.pt", tmp_path / "copy")
    (checkpoint / "optimizer.pt").unlink()
    os.symlink(tmp_path / "copy", checkpoint / "optimizer.pt")
    assert len(problems(checkpoint)) == 1 and "is a link" in problems(checkpoint)[0]


def test_a_link_or_a_pipe_cannot_be_promised(tmp_path):
    os.symlink("/dev/zero", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a link"):
        write_manifest(tmp_path, 1, 1, {})
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a plain file"):
        write_manifest(tmp_path, 1, 1, {})


def test_a_name_that_leads_outside_is_refused_even_with_a_right_checksum(checkpoint, tmp_path):
    (tmp_path / "outside").write_bytes(b"x")
    body = json.loads((checkpoint / "manifest.json").read_text())
    del body["checksum"]
    body["files"]["../outside"] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    body["checksum"] = hashlib.sha256(canonical).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(body))
    assert len(problems(checkpoint)) == 1 and "not a plain name" in problems(checkpoint)[0]


def test_a_checkpoint_whose_copy_was_never_finished_is_found(checkpoint):
    (checkpoint / ".incomplete").write_text("")
    assert problems(checkpoint) == ["copying it into place was never finished"]


def test_hashing_in_blocks_gives_the_hash_of_the_whole(tmp_path):
    content = os.urandom(HASH_BLOCK_BYTES + 17)
    (tmp_path / "large").write_bytes(content)
    assert sha256_of(str(tmp_path / "large")) == hashlib.sha256(content).hexdigest()
