"""A manifest finds every kind of damage and names the file."""

import hashlib
import json
import os
import shutil
import types

import pytest
import torch

from trainwright import __version__
from trainwright.checkpoint import manifest as manifest_module
from trainwright.checkpoint import sharded
from trainwright.checkpoint.manifest import (
    FROZEN_NOTE,
    HASH_BLOCK_BYTES,
    how_to_accept,
    problems,
    read_manifest,
    sha256_of,
    some_of,
    write_manifest,
)
from trainwright.checkpoint.paths import MAX_NAMED
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


def test_the_text_of_a_manifest_is_sorted_and_ends_a_line(checkpoint):
    text = (checkpoint / "manifest.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert read_manifest(checkpoint).writer == f"trainwright {__version__}"
    again = write_manifest(checkpoint, 3, 2, {"samples": 48})
    assert again == read_manifest(checkpoint) and "manifest.json" not in again.files


def test_every_file_is_flushed_and_an_error_of_that_is_raised(checkpoint):
    flushed = []
    write_manifest(checkpoint, 3, 2, {}, flush=flushed.append)
    assert sorted(flushed) == sorted(
        str(path) for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"
    )

    def full(path):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_manifest(checkpoint, 3, 2, {}, flush=full)


def test_a_known_hash_of_frozen_weights_is_believed_and_an_unknown_one_worked_out(checkpoint):
    known = {"sha256": "0" * 64, "frozen": "f"}
    manifest = write_manifest(
        checkpoint, 3, 2, {}, frozen={"model.safetensors": known, "optimizer.pt": {"frozen": "g"}}
    )
    assert manifest.files["model.safetensors"] == {"size": 200, **known}
    hashed = hashlib.sha256((checkpoint / "optimizer.pt").read_bytes()).hexdigest()
    assert manifest.files["optimizer.pt"] == {"size": 200, "sha256": hashed, "frozen": "g"}
    (found,) = problems(checkpoint)
    assert found.startswith("model.safetensors has changed") and found.endswith(FROZEN_NOTE)


def test_a_file_whose_hash_is_known_is_not_read(checkpoint, monkeypatch):
    read = []
    monkeypatch.setattr(manifest_module, "sha256_of", lambda path: read.append(os.path.basename(path)) or "0" * 64)
    write_manifest(checkpoint, 3, 2, {}, frozen={"model.safetensors": {"sha256": "1" * 64, "frozen": "f"}})
    assert sorted(read) == sorted({*FILES, "adapter_model.safetensors"} - {"model.safetensors"})


def test_what_is_no_directory_or_has_another_name_is_said(checkpoint, tmp_path):
    assert problems(tmp_path / "absent") == [f"{tmp_path / 'absent'} is not a directory"]
    moved = tmp_path / "checkpoint-4"
    checkpoint.rename(moved)
    assert problems(moved) == ["manifest.json belongs to step 3, not to step 4"]


def test_a_checkpoint_of_ours_without_its_manifest_is_not_taken_for_anothers(checkpoint):
    (checkpoint / "manifest.json").unlink()
    (found,) = problems(checkpoint)
    assert found == "manifest.json is missing, though loop_state.json shows that trainwright wrote this checkpoint"
    (checkpoint / "loop_state.json").unlink()
    (checkpoint / "model.safetensors").write_bytes(b"")
    assert problems(checkpoint, deep=False) != [found] and problems(checkpoint, deep=False) != []


@pytest.mark.parametrize("num_absent", [MAX_NAMED, MAX_NAMED + 1, MAX_NAMED + 5])
@pytest.mark.parametrize("deep", [True, False])
def test_of_very_many_missing_files_the_first_are_named_and_the_others_counted(tmp_path, num_absent, deep):
    names = [f"{number:03}.bin" for number in range(num_absent)]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "kept.bin").write_bytes(b"x")
    write_manifest(tmp_path, 1, 1, {})
    for name in names:
        (tmp_path / name).unlink()
    (tmp_path / "kept.bin").write_bytes(b"")
    more = num_absent - MAX_NAMED
    assert problems(tmp_path, deep=deep) == [
        *(f"{name} is missing" for name in names[:MAX_NAMED]),
        *([f"{more} more files of the manifest are missing"] if more else []),
        "kept.bin is empty; it had 1 bytes",
    ]


def test_many_sentences_of_one_kind_are_cut_where_two_or_more_would_be_left_out():
    sentences = [str(number) for number in range(MAX_NAMED + 2)]
    assert some_of(sentences[:-1]) == sentences[:-1]
    assert some_of(sentences) == [*sentences[:MAX_NAMED], "and 2 more of this kind"]


def test_many_files_that_nobody_promised_are_not_all_named(tmp_path):
    write_manifest(tmp_path, 1, 1, {})
    names = sorted(f"rng_state_{number}.pth" for number in range(MAX_NAMED + 10))
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    found = problems(tmp_path)
    assert [sentence.split(" ")[0] for sentence in found] == [*names[:MAX_NAMED], "and"]
    assert found[-1] == "and 10 more of this kind"


def test_a_sentence_has_an_end_whatever_a_file_is_called(checkpoint, monkeypatch):
    monkeypatch.setattr(manifest_module, "MAX_SENTENCE", 10)
    (checkpoint / "optimizer.pt").unlink()
    assert problems(checkpoint) == ["optimizer.... (23 characters)"]


def test_a_directory_in_place_of_a_file_is_said_and_no_link_is_followed(checkpoint):
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "optimizer.pt").mkdir()
    assert problems(checkpoint) == ["optimizer.pt is missing"] or "not a plain file" in problems(checkpoint)[0]
    os.symlink("model.safetensors", checkpoint / "note.txt")
    os.mkfifo(checkpoint / "pipe")
    found = problems(checkpoint, deep=False)[1:]
    assert [sentence.split(": ")[0] for sentence in found] == [
        "note.txt is not in the manifest",
        "pipe is not in the manifest",
    ]
    assert "is a link" in found[0] and "not a plain file" in found[1]


def test_a_json_file_larger_than_any_trainer_writes_is_not_read(checkpoint, monkeypatch):
    size = (checkpoint / "trainer_state.json").stat().st_size
    (checkpoint / "weights.bin").write_bytes(b"x" * 300)
    (checkpoint / "loop_state.json").unlink()
    write_manifest(checkpoint, 3, 2, {})
    body = json.loads((checkpoint / "manifest.json").read_text())
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", size - 1)
    monkeypatch.setattr(manifest_module, "read_manifest", lambda directory: None)
    expected = body["files"]["trainer_state.json"]
    said = manifest_module._problem_of(checkpoint, "trainer_state.json", expected, deep=False)
    assert said == f"trainer_state.json has {size} bytes, more than {size - 1}, and is not read"
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", size)
    assert manifest_module._problem_of(checkpoint, "trainer_state.json", expected, deep=False) is None
    assert manifest_module._problem_of(checkpoint, "weights.bin", body["files"]["weights.bin"], deep=False) is None


@pytest.mark.parametrize("name", ["trainer_state.json", "loop_state.json", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_was_promised_and_holds_what_cannot_be_is_found_by_reading_it(checkpoint, name):
    if name.endswith(".json"):
        (checkpoint / name).write_text('{"global_step": 4}')  # of another step; no state of a loop
    else:
        torch.save([1], checkpoint / name)
    write_manifest(checkpoint, 3, 2, {})
    found = problems(checkpoint)
    assert len(found) == 1 and name in found[0]
    assert problems(checkpoint, deep=False) == []


def test_who_edited_a_checkpoint_is_told_how_to_accept_it(checkpoint):
    assert how_to_accept(checkpoint).endswith(f"`trainwright check --accept {checkpoint}`.")


def test_a_file_that_was_empty_may_be_and_a_schedule_may_hold_objects_of_its_user(checkpoint):
    (checkpoint / "note.txt").write_bytes(b"")
    torch.save({"last_epoch": 3, "mine": types.SimpleNamespace()}, checkpoint / "scheduler.pt")
    write_manifest(checkpoint, 3, 2, {})
    assert problems(checkpoint) == []


@pytest.mark.parametrize("deep", [True, False])
def test_a_checkpoint_of_anothers_is_looked_at_as_deeply(tmp_path, monkeypatch, deep):
    asked = []
    monkeypatch.setattr(manifest_module, "structural_problems", lambda path, deep: asked.append((path, deep)) or ["a"])
    assert problems(tmp_path, deep=deep) == ["a"]
    assert asked == [(tmp_path, deep)]


def test_parts_that_make_no_wholes_are_damage_that_only_reading_finds(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sharded, "problem", lambda directory: asked.append(directory) or "a part is missing")
    for step, name in ((3, "sharded/part.safetensors"), (4, "whole.safetensors")):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "sharded").mkdir(parents=True)
        (folder / name).write_bytes(b"weights")
        write_manifest(folder, step, 1, {})
    first, second = tmp_path / "checkpoint-3", tmp_path / "checkpoint-4"
    assert problems(first) == ["a part is missing"] and asked == [first]
    assert problems(first, deep=False) == [] and problems(second) == [] and asked == [first]
    (first / "sharded" / "part.safetensors").write_bytes(b"changed")
    assert len(problems(first)) == 1 and asked == [first]  # whose bytes are wrong, its tensors are not looked at
