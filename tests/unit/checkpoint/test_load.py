"""Everything that is written comes back; damage is found before it is loaded; no file runs code."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from trainwright.checkpoint.load import (
    find_resumable,
    load_loop_state,
    load_optimizer,
    load_rng,
    load_scaler,
    load_scheduler,
)
from trainwright.checkpoint.save import save_optimizer, save_rng, save_scaler, save_scheduler, staged
from trainwright.checkpoint.tensors import load_tensors
from trainwright.checkpoint.weights import load_weights

FIXTURES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
RELEASES = sorted(path.name for path in FIXTURES.iterdir())


def parts(optimizer_class=torch.optim.AdamW):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, num_steps):
    for step in range(num_steps):
        model(torch.full((4, 3), float(step + 1))).pow(2).mean().backward()  # (batch, feature)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def write(output_dir, *steps):
    for step in steps:
        with staged(output_dir / f"checkpoint-{step}", step=step, world_size=1, position={}) as folder:
            Path(folder, "model.safetensors").write_bytes(b"weights")
            Path(folder, "trainer_state.json").write_text(json.dumps({"global_step": step}))


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_a_run_that_is_resumed_ends_where_an_uninterrupted_one_ends(tmp_path, optimizer_class):
    straight = parts(optimizer_class)
    train(*straight, 2)
    save_optimizer(tmp_path, straight[1])
    save_scheduler(tmp_path, straight[2])
    resumed = parts(optimizer_class)
    resumed[0].load_state_dict({name: value.clone() for name, value in straight[0].state_dict().items()})
    load_optimizer(tmp_path, resumed[1])
    load_scheduler(tmp_path, resumed[2])
    train(*straight, 2)
    train(*resumed, 2)
    assert torch.equal(straight[0].weight, resumed[0].weight)
    assert straight[2].get_last_lr() == resumed[2].get_last_lr()


def test_the_loss_scale_comes_back_and_a_missing_one_only_warns(tmp_path, caplog):
    load_scaler(tmp_path, torch.amp.GradScaler("cpu"))
    assert "scaler.pt is missing" in caplog.text
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    save_scaler(tmp_path, scaler)
    other = torch.amp.GradScaler("cpu")
    load_scaler(tmp_path, other)
    assert other.state_dict() == scaler.state_dict()


def test_a_numpy_number_in_a_schedule_comes_back(tmp_path):
    torch.save({"rate": np.float64(0.5), "rates": np.arange(3, dtype=np.float32)}, tmp_path / "scheduler.pt")
    state = load_tensors(tmp_path / "scheduler.pt")
    assert state["rate"] == 0.5 and state["rates"].tolist() == [0.0, 1.0, 2.0]


def test_a_file_of_the_format_before_archives_is_read(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert load_tensors(tmp_path / "old.bin")["w"].tolist() == [1.0, 1.0]


def test_a_missing_optimizer_or_schedule_is_an_error_that_says_what_it_costs(tmp_path):
    _, optimizer, scheduler = parts()
    with pytest.raises(FileNotFoundError, match="made with save_only_model: cannot be resumed; start from its weights"):
        load_optimizer(tmp_path, optimizer)
    save_optimizer(tmp_path, optimizer)
    with pytest.raises(FileNotFoundError, match=r"scheduler\.pt is missing.*learning rate would start again"):
        load_scheduler(tmp_path, scheduler)
    os.remove(tmp_path / "optimizer.pt")
    save_scheduler(tmp_path, scheduler)
    with pytest.raises(FileNotFoundError, match=r"optimizer\.pt is missing.*start from nothing"):
        load_optimizer(tmp_path, optimizer)


def test_the_state_of_another_model_is_refused_by_name(tmp_path):
    save_optimizer(tmp_path, parts()[1])
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"optimizer\.pt does not fit AdamW.*written for other parameters"):
        load_optimizer(tmp_path, other)


def test_missing_random_state_warns_and_leaves_the_generators_alone(tmp_path, caplog):
    random.seed(1)
    expected = random.Random(1).random()
    load_rng(tmp_path, rank=1, world_size=2)
    assert random.random() == expected
    assert "rng_state_1.pth is missing" in caplog.text and "dropout" in caplog.text


def test_random_state_of_another_shape_is_refused(tmp_path):
    torch.save({"python": 3}, tmp_path / "rng_state.pth")
    with pytest.raises(ValueError, match=r"rng_state\.pth holds no random state that fits"):
        load_rng(tmp_path)


def test_a_loop_state_is_empty_where_there_is_none_and_an_error_where_it_is_damaged(tmp_path):
    assert load_loop_state(tmp_path) == {}
    for content in ("[1]", '{"a"'):
        (tmp_path / "loop_state.json").write_text(content)
        with pytest.raises(ValueError, match=r"loop_state\.json is damaged"):
            load_loop_state(tmp_path)


class Trap:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


READERS = {
    "optimizer.pt": lambda folder: load_optimizer(folder, parts()[1]),
    "scheduler.pt": lambda folder: load_scheduler(folder, parts()[2]),
    "scaler.pt": lambda folder: load_scaler(folder, torch.amp.GradScaler("cpu")),
    "rng_state.pth": load_rng,
    "pytorch_model.bin": lambda folder: load_weights(parts()[0], folder),
}


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_no_file_runs_code_that_stands_in_it(tmp_path, name, archive):
    canary = tmp_path / "canary"
    torch.save({"x": Trap(canary)}, tmp_path / name, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=f"{name} holds more than tensors"):
        READERS[name](tmp_path)
    assert not canary.exists()
    torch.load(tmp_path / name, weights_only=False)["x"].close()
    assert canary.exists()  # the trap works


@pytest.mark.parametrize("name", READERS)
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, name):
    torch.save({"x": torch.arange(1000)}, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for length in (len(content) // 2, 10, 0):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=name):
            READERS[name](tmp_path)


def test_the_newest_checkpoint_is_resumed(tmp_path):
    write(tmp_path, 9, 10)
    assert find_resumable(tmp_path, is_explicit=False) == str(tmp_path / "checkpoint-10")


def test_a_damaged_checkpoint_is_named_kept_aside_and_the_next_older_one_used(tmp_path, caplog):
    write(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"WEIGHTS")
    assert find_resumable(tmp_path, is_explicit=False) == str(tmp_path / "checkpoint-1")
    assert "trainer_state.json is missing" in caplog.text and "model.safetensors has changed" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2.damaged", "checkpoint-3.damaged"]


def test_a_damaged_checkpoint_that_cannot_be_renamed_is_skipped(tmp_path, caplog):
    write(tmp_path, 1, 2)
    (tmp_path / "checkpoint-2.damaged").mkdir()
    (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
    assert find_resumable(tmp_path, is_explicit=False) == str(tmp_path / "checkpoint-1")
    assert "could not be renamed" in caplog.text and (tmp_path / "checkpoint-2").is_dir()


def test_a_directory_of_the_user_is_skipped_and_keeps_its_name(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoint-99").mkdir()
    assert find_resumable(tmp_path, is_explicit=False) == str(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-99").is_dir()


def test_without_a_good_checkpoint_the_error_says_why(tmp_path):
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        find_resumable(tmp_path / "absent", is_explicit=False)
    write(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"Every checkpoint in .* is damaged.*model\.safetensors is missing"):
        find_resumable(tmp_path, is_explicit=False)


def test_an_explicit_damaged_checkpoint_is_an_error_that_names_the_newest_good_one(tmp_path):
    write(tmp_path, 1, 2, 3)
    assert find_resumable(tmp_path / "checkpoint-2", is_explicit=True) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors is empty.*newest good .* is .*checkpoint-2\."):
        find_resumable(tmp_path / "checkpoint-3", is_explicit=True)
    assert (tmp_path / "checkpoint-3").is_dir()
    with pytest.raises(ValueError, match="is not a directory"):
        find_resumable(tmp_path / "checkpoint-4", is_explicit=True)


@pytest.mark.parametrize("release", RELEASES)
def test_checkpoints_of_each_release_are_found_and_loaded(tmp_path, release):
    transformers = pytest.importorskip("transformers")
    shutil.copytree(FIXTURES / release / "checkpoint-2", tmp_path / "checkpoint-2")
    folder = find_resumable(tmp_path, is_explicit=False)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    assert load_weights(model, folder, strict=True) == ([], [])
    # The reference keeps biases and norms free of weight decay: matrices first.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain}], lr=1.0)
    load_optimizer(folder, optimizer)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in decayed + plain)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 1.0])
    load_scheduler(folder, scheduler)
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    assert scheduler.last_epoch == state["global_step"] == 2
    load_rng(folder)
    expected = load_tensors(Path(folder) / "rng_state.pth")
    assert random.getstate() == expected["python"] and torch.equal(torch.get_rng_state(), expected["cpu"])
    assert np.array_equal(np.random.get_state()[1], expected["numpy"][1])


def test_the_random_state_has_the_documented_keys(tmp_path):
    save_rng(tmp_path)
    reference = load_tensors(FIXTURES / RELEASES[0] / "checkpoint-2" / "rng_state.pth")
    ours = load_tensors(tmp_path / "rng_state.pth")
    assert {"python", "numpy", "cpu"} == set(reference) <= set(ours)
    assert all(type(ours[key]) is type(reference[key]) for key in reference)
