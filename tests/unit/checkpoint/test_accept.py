"""A checkpoint that its user edited is refused until it is accepted; what cannot be read is never accepted."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainwright.checkpoint.manifest import problems
from trainwright.cli import main


@pytest.fixture
def out(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=1).train()
    return tmp_path / "out"


def average(out):
    """The weights of the last checkpoint become the mean of those of both."""
    first, last = (load_file(out / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    mean = {name: (first[name] + last[name]) / 2 for name in first}
    save_file(mean, out / "checkpoint-2" / "model.safetensors", metadata={"format": "pt"})
    return mean


def resumed(make_trainer, out, checkpoint):
    trainer = make_trainer(output_dir=str(out), max_steps=3, save_strategy="no")
    loaded = {}
    load = type(trainer)._load_from_checkpoint

    def note(path, model=None):
        load(trainer, path, model)
        loaded.update({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})

    trainer._load_from_checkpoint = note
    trainer.train(resume_from_checkpoint=checkpoint)
    return loaded


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_averaged_weights_are_refused_by_an_error_that_names_the_command_and_used_after_it(make_trainer, out, capsys):
    mean, directory = average(out), out / "checkpoint-2"
    command = f"trainwright check --accept {directory}"
    with pytest.raises(ValueError, match=r"model\.safetensors has changed") as error:
        resumed(make_trainer, out, str(directory))
    assert command in str(error.value)
    assert main(["check", str(out)]) == 1 and command in capsys.readouterr().out
    assert main(command.split()[1:]) == 0
    assert "model.safetensors has changed" in capsys.readouterr().out  # what was accepted
    assert problems(directory) == [] and main(["check", str(out)]) == 0
    assert same(resumed(make_trainer, out, str(directory)), mean)


def test_one_that_a_resume_had_set_aside_gets_its_name_back(make_trainer, out, caplog):
    mean = average(out)
    resumed(make_trainer, out, True)
    aside = out / "checkpoint-2.damaged"
    assert f"trainwright check --accept {aside}" in caplog.text
    assert main(["check", "--accept", str(aside)]) == 0
    assert not aside.exists() and same(resumed(make_trainer, out, True), mean)


def test_weights_that_were_converted_to_another_file_are_accepted(make_trainer, out):
    directory = out / "checkpoint-2"
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    assert main(["check", "--accept", str(directory)]) == 0
    assert same(resumed(make_trainer, out, True), weights)


def test_the_position_in_the_data_and_the_run_are_those_of_before(out):
    before = json.loads((out / "checkpoint-2" / "manifest.json").read_text())
    average(out)
    (out / "checkpoint-1" / "manifest.json").write_text("{")  # also where it can no longer be read
    for step in (1, 2):
        assert main(["check", "--accept", str(out / f"checkpoint-{step}")]) == 0
    after = json.loads((out / "checkpoint-2" / "manifest.json").read_text())
    assert {k: after[k] for k in ("step", "world_size", "position")} == {
        k: before[k] for k in ("step", "world_size", "position")
    }
    assert problems(out / "checkpoint-1") == [] and problems(out / "checkpoint-2") == []


def cut(name):
    def damage(directory):
        path = directory / name
        path.write_bytes(path.read_bytes()[:-9])

    return damage


def remove(name):
    return lambda directory: (directory / name).unlink()


def two_weights(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")


def another_step(directory):
    state = json.loads((directory / "trainer_state.json").read_text())
    (directory / "trainer_state.json").write_text(json.dumps(state | {"global_step": 7}))


def link(directory):
    os.rename(directory / "model.safetensors", directory.parent / "elsewhere")
    (directory / "model.safetensors").symlink_to(directory.parent / "elsewhere")


def objects(directory):
    torch.save({"weight": pytest.raises}, directory / "optimizer.pt")


@pytest.mark.parametrize("damage, named", [
    (cut("model.safetensors"), "model.safetensors is damaged"), (cut("optimizer.pt"), "optimizer.pt is damaged"),
    (cut("trainer_state.json"), "trainer_state.json is damaged"), (cut("rng_state.pth"), "rng_state.pth is damaged"),
    (remove("model.safetensors"), "the weights are missing"), (remove("trainer_state.json"), "is missing"),
    (remove("scheduler.pt"), "scheduler.pt is missing"), (two_weights, "of which only one would be loaded"),
    (another_step, "belongs to step 7"), (link, "is a link"), (objects, "holds more than tensors"),
])  # fmt: skip
def test_what_cannot_be_read_is_not_accepted_and_left_as_it_is(out, capsys, damage, named):
    directory = out / "checkpoint-2"
    damage(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert main(["check", "--accept", str(directory)]) == 1
    assert named in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before and problems(directory)


def test_the_directory_of_a_run_is_not_accepted_as_a_whole(out, capsys):
    assert main(["check", "--accept", str(out)]) == 1
    assert "name the checkpoint in it that you edited" in capsys.readouterr().err
    assert main(["check", "--accept", str(out.parent)]) == 1
