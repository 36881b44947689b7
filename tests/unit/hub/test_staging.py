"""Choosing the files of a push, and holding them still."""

import os

import pytest

from trainwright.hub import staging


def write(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


def test_the_model_of_a_checkpoint_is_all_but_what_only_resuming_needs(tmp_path):
    model = [
        "added/extra_template.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "training_args.bin",
    ]
    resume = ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_3.pth", "trainer_state.json"]
    resume += ["manifest.json", "loop_state.json", "global_step4/zero.pt", "pytorch_model_fsdp_0/x.distcp", "latest"]
    write(tmp_path, *model, *resume)
    assert staging.modeling_files_to_copy(str(tmp_path)) == model


def test_a_pattern_matches_the_whole_path_in_the_folder(tmp_path):
    write(tmp_path, "checkpoint-1/model.safetensors", "a/checkpoint-1.txt", "_x", "a/_x")
    assert staging.files_in(str(tmp_path), ["checkpoint-*", "_*"]) == ["a/_x", "a/checkpoint-1.txt"]


def test_only_directories_with_a_step_are_checkpoints(tmp_path):
    write(tmp_path, "checkpoint-10/x", "checkpoint-best/x", "other/x")
    write(tmp_path, "checkpoint-7")
    assert staging.checkpoints_in(str(tmp_path)) == ["checkpoint-10"]


def test_a_staged_file_is_a_link_and_survives_the_removal_of_its_source(tmp_path):
    write(tmp_path, "model/weights")
    source = tmp_path / "model" / "weights"
    staged = staging.stage({"deep/er/weights": str(source)}, directory=str(tmp_path))
    target = os.path.join(staged, "deep", "er", "weights")
    assert os.path.samefile(target, source)
    source.unlink()
    with open(target) as file:
        assert file.read() == "model/weights"


def test_where_links_are_impossible_the_files_are_copied(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("no links on this file system")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path, "weights")
    staged = staging.stage({"weights": str(tmp_path / "weights")}, directory=str(tmp_path))
    with open(os.path.join(staged, "weights")) as file:
        assert file.read() == "weights"


def test_a_symbolic_link_is_staged_as_the_file_it_leads_to(tmp_path):
    write(tmp_path, "blob")
    (tmp_path / "weights").symlink_to(tmp_path / "blob")
    staged = staging.stage({"weights": str(tmp_path / "weights")}, directory=str(tmp_path))
    (tmp_path / "blob").unlink()
    with open(os.path.join(staged, "weights")) as file:
        assert file.read() == "blob"


def test_a_missing_file_leaves_no_half_stage_behind(tmp_path):
    with pytest.raises(FileNotFoundError):
        staging.stage({"weights": str(tmp_path / "weights")}, directory=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
