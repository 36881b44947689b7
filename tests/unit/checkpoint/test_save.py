"""A checkpoint is there completely or not at all, wherever the process dies."""

import errno
import json
import os
import random
import shutil
import zipfile
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from trainwright.checkpoint import save
from trainwright.checkpoint.layout import get_last_checkpoint
from trainwright.checkpoint.leftovers import clean_up_staging
from trainwright.checkpoint.load import load_loop_state, load_rng
from trainwright.checkpoint.manifest import problems, read_manifest
from trainwright.checkpoint.save import replacing, save_loop_state, save_rng, save_scheduler, save_training_args, staged

# Every call of the operating system that changes what a crash leaves behind.
CALLS = [(os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "remove"), (os, "rmdir"), (os, "unlink")]


def write(output_dir, step, content):
    with staged(output_dir / f"checkpoint-{step}", step=step, world_size=1, position={"samples": step}) as folder:
        state = json.dumps({"global_step": step}).encode()
        for name, written in (("model.safetensors", content), ("trainer_state.json", state)):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(written)


def content_of(output_dir, step):
    return (output_dir / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def run_and_die(action, call_to_die_at, after):
    """Run `action` in a forked child that exits before (or after) its n-th call; whether it died there."""
    pid = os.fork()
    if pid == 0:
        calls = 0

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal calls
                calls += 1
                dies = calls == call_to_die_at
                if dies and not after:
                    os._exit(9)
                try:
                    return function(*args, **kwargs)
                finally:
                    if dies:
                        os._exit(9)

            return wrapper

        for module, name in CALLS:
            setattr(module, name, counted(getattr(module, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("after", [False, True])
def test_a_run_killed_at_any_point_leaves_the_old_checkpoints_and_at_most_a_complete_new_one(tmp_path, after):
    died, num_new = True, 0
    point = 0
    while died:
        point += 1
        output_dir = tmp_path / str(point)
        write(output_dir, 1, b"old")
        died = run_and_die(lambda directory=output_dir: write(directory, 2, b"new"), point, after)
        clean_up_staging(output_dir)
        last = get_last_checkpoint(output_dir)
        assert problems(last) == [] and content_of(output_dir, 1) == b"old"
        num_new += last.endswith("checkpoint-2")
        assert sorted(os.listdir(output_dir)) in (["checkpoint-1"], ["checkpoint-1", "checkpoint-2"])
    # At least mkdir, two files, the manifest, the directory, rename, the parent; then once through without dying.
    assert point > 7 and 0 < num_new < point


@pytest.mark.parametrize("after", [False, True])
def test_a_run_killed_while_replacing_a_checkpoint_leaves_the_old_or_the_new_one(tmp_path, after):
    died, point, seen = True, 0, set()
    while died:
        point += 1
        output_dir = tmp_path / str(point)
        write(output_dir, 1, b"old")
        died = run_and_die(lambda directory=output_dir: write(directory, 1, b"new"), point, after)
        clean_up_staging(output_dir)
        assert os.listdir(output_dir) == ["checkpoint-1"]
        assert problems(output_dir / "checkpoint-1") == []
        seen.add(content_of(output_dir, 1))
    assert seen == {b"old", b"new"} and point > 8


def test_an_exception_removes_the_staged_directory_and_goes_on(tmp_path):
    write(tmp_path, 1, b"old")
    staging = staged(tmp_path / "checkpoint-1", step=1, world_size=1, position={})
    with pytest.raises(ZeroDivisionError), staging as folder:
        assert os.path.basename(folder) == f".checkpoint-1.staged-{os.getpid()}"
        assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        _ = 1 / 0
    assert os.listdir(tmp_path) == ["checkpoint-1"] and content_of(tmp_path, 1) == b"old"


def test_a_full_disk_leaves_the_old_checkpoint_alone(tmp_path, monkeypatch):
    write(tmp_path, 1, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 1, b"new")
    assert os.listdir(tmp_path) == ["checkpoint-1"] and content_of(tmp_path, 1) == b"old"


def test_the_manifest_says_step_world_size_and_position(tmp_path):
    write(tmp_path / "not" / "yet" / "there", 7, b"x")
    manifest = read_manifest(tmp_path / "not" / "yet" / "there" / "checkpoint-7")
    assert (manifest.step, manifest.world_size, manifest.position) == (7, 1, {"samples": 7})


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOTSUP])
def test_where_rename_is_missing_the_checkpoint_is_copied(tmp_path, monkeypatch, code):
    def no_rename(source, target):
        raise OSError(code, "rename")

    monkeypatch.setattr(os, "rename", no_rename)
    for content in (b"first", b"second"):
        write(tmp_path, 1, content)
        assert os.listdir(tmp_path) == ["checkpoint-1"] and content_of(tmp_path, 1) == content
        assert problems(tmp_path / "checkpoint-1") == []


def test_a_copy_that_breaks_off_is_no_checkpoint(tmp_path, monkeypatch):
    def no_rename(source, target):
        raise OSError(errno.EXDEV, "rename")

    def half(source, target, **options):
        shutil.copy(os.path.join(source, "manifest.json"), target)
        raise OSError(errno.ENOSPC, "full")

    write(tmp_path, 1, b"old")
    monkeypatch.setattr(os, "rename", no_rename)
    monkeypatch.setattr(shutil, "copytree", half)
    with pytest.raises(OSError, match="full"):
        write(tmp_path, 2, b"new")
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert problems(tmp_path / "checkpoint-2") == ["copying it into place was never finished"]


def write_model(directory, name, content):
    with replacing(directory) as folder:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
        assert content_of_directory(directory).get(name) != content  # not before the block ends


def content_of_directory(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_model_replaces_the_older_one_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"mine")
    write_model(tmp_path, "model.safetensors", b"old")
    write_model(tmp_path, "model.safetensors", b"new")
    assert content_of_directory(tmp_path) == {"model.safetensors": b"new", "notes.txt": b"mine"}
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "notes.txt"]


def test_weights_of_another_name_do_not_stay_to_be_taken_for_the_new_ones(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"adapter")
    write_model(tmp_path, "model.safetensors", b"old")
    write_model(tmp_path, "pytorch_model.bin", b"new")
    assert content_of_directory(tmp_path) == {"pytorch_model.bin": b"new", "adapter_model.safetensors": b"adapter"}


def test_a_model_that_cannot_be_written_leaves_the_older_one(tmp_path):
    write_model(tmp_path, "model.safetensors", b"old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path) as folder:
        (tmp_path / folder / "model.safetensors").write_bytes(b"half")
        _ = 1 / 0
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert content_of_directory(tmp_path) == {"model.safetensors": b"old"}


def test_random_numbers_go_on_where_they_were_saved(tmp_path):
    for draw in (random.random, np.random.rand, lambda: torch.rand(()).item()):
        draw()
    save_rng(tmp_path)
    expected = (random.random(), np.random.rand(), torch.rand(3).tolist())
    load_rng(tmp_path)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_each_process_writes_its_own_random_state(tmp_path):
    save_rng(tmp_path, rank=1, world_size=2)
    assert os.listdir(tmp_path) == ["rng_state_1.pth"]


@dataclass
class Arguments:
    output_dir: str = "out"
    hub_token: str | None = "hf_secret_1"
    push_to_hub_token: str | None = "hf_secret_2"
    extra: list = field(default_factory=list)


def test_tokens_are_never_written_and_the_arguments_keep_them(tmp_path):
    args = Arguments()
    save_training_args(tmp_path, args)
    with zipfile.ZipFile(tmp_path / "training_args.bin") as archive:
        written = b"".join(archive.read(name) for name in archive.namelist())
    assert b"output_dir" in written and b"hf_secret" not in written
    assert args.hub_token == "hf_secret_1"


def test_arguments_that_cannot_be_pickled_do_not_cost_the_checkpoint(tmp_path, caplog):
    save_training_args(tmp_path, Arguments(extra=[lambda: None]))
    assert os.listdir(tmp_path) == [] and "training_args.bin was not written" in caplog.text


def test_the_loop_state_comes_back(tmp_path):
    state = {"window": {"sum": 1.5, "num_losses": 2}, "position": {"epoch": 1, "samples_in_epoch": 48}, "none": None}
    state |= {"total_loss": 3.5, "last_logged_step": 4}
    save_loop_state(tmp_path, state)
    assert load_loop_state(tmp_path) == state


class OddSchedule:
    def state_dict(self):
        return {"arguments": Arguments()}


def test_state_that_could_not_be_read_back_is_reported_when_it_is_written(tmp_path, caplog):
    save_scheduler(tmp_path, OddSchedule())
    assert "Arguments" in caplog.text and "add_safe_globals" in caplog.text
