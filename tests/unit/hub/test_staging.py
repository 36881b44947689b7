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
    for name in ("checkpoint-1/weights", "model.safetensors"):
        write(tmp_path, name)
        staged = staging.stage({"deep/er/weights": str(tmp_path / name)}, directory=str(tmp_path))
        target = os.path.join(staged, "deep", "er", "weights")
        assert os.path.samefile(target, tmp_path / name)
        (tmp_path / name).unlink()
        with open(target) as file:
            assert file.read() == name


def test_a_file_that_may_change_is_staged_as_a_copy(tmp_path):
    write(tmp_path, "runs/events")
    staged = staging.stage({"runs/events": str(tmp_path / "runs" / "events")}, directory=str(tmp_path))
    with open(tmp_path / "runs" / "events", "a") as file:
        file.write(" and more")
    with open(os.path.join(staged, "runs", "events")) as file:
        assert file.read() == "runs/events"


def test_where_links_are_impossible_the_files_are_copied(tmp_path, monkeypatch):
    def refuse(source, target, **options):
        raise PermissionError("no links on this file system")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path, "checkpoint-1/weights")
    staged = staging.stage({"weights": str(tmp_path / "checkpoint-1" / "weights")}, directory=str(tmp_path))
    with open(os.path.join(staged, "weights")) as file:
        assert file.read() == "checkpoint-1/weights"


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


# -- what is replaced between the choice of the files and the snapshot -------------------------------------------------


def swapped(tmp_path, name, **how):
    """A file that was chosen for a push; then its place leads to a private file."""
    private = tmp_path / "private"
    write(private, "key")
    out = tmp_path / "out"
    write(out, name)
    chosen = {name: str(out / name)}
    assert staging.files_in(str(out)) == [name]
    if how.get("folder"):
        (out / name).unlink()
        (out / name).parent.rmdir()
        write(private, os.path.basename(name))
        (out / name).parent.symlink_to(private)
    elif how.get("pipe"):
        (out / name).unlink()
        os.mkfifo(out / name)
    else:
        (out / name).unlink()
        (out / name).symlink_to(private / "key")
    return chosen, out


@pytest.mark.parametrize("name", ["events", "model.safetensors", "checkpoint-1/model.safetensors"])
@pytest.mark.parametrize("how", [{}, {"folder": True}, {"pipe": True}], ids=["link", "folder", "pipe"])
def test_what_was_swapped_for_something_private_is_not_staged(name, how, tmp_path):
    if how.get("folder") and "/" not in name:
        pytest.skip("it is in no folder")
    chosen, out = swapped(tmp_path, name, **how)
    with pytest.raises(OSError, match=r"leads out of|no plain file"):
        staging.stage(chosen, directory=str(out))
    assert not [entry for entry in os.listdir(out) if entry.startswith(staging.STAGING_PREFIX)]


@pytest.mark.parametrize("name", ["events", "checkpoint-1/model.safetensors"])
def test_what_is_swapped_in_the_last_moment_is_not_followed(name, tmp_path, monkeypatch):
    write(tmp_path, "private/key", f"out/{name}")
    out, realpath = tmp_path / "out", os.path.realpath

    def then_swap(path, **options):
        found = realpath(path, **options)
        if str(path).endswith(name) and not (out / name).is_symlink():
            (out / name).unlink()
            (out / name).symlink_to(tmp_path / "private" / "key")
        return found

    monkeypatch.setattr(os.path, "realpath", then_swap)
    with pytest.raises(OSError):
        staging.stage({name: str(out / name)}, directory=str(out))
    assert not [entry for entry in os.listdir(out) if entry.startswith(staging.STAGING_PREFIX)]


def test_a_file_that_is_replaced_while_it_is_linked_is_not_staged(tmp_path, monkeypatch):
    write(tmp_path, "checkpoint-1/weights", "other")
    link = os.link

    def swap_then_link(source, target, **options):
        os.replace(tmp_path / "other", tmp_path / "checkpoint-1" / "weights")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", swap_then_link)
    with pytest.raises(OSError, match="was replaced while it was linked"):
        staging.stage({"weights": str(tmp_path / "checkpoint-1" / "weights")}, directory=str(tmp_path))
