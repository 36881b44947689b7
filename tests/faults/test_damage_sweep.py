"""Damage each file of the newest checkpoint in every way: it is found, named, and the one before it is used.

Without a manifest (other implementations) the claim is smaller, and is held as it is written in docs/reliability.md.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from runs import difference, end_of, make_run, tensors_of

from trainwright.checkpoint.load import find_resumable, load_tensors
from trainwright.checkpoint.manifest import problems
from trainwright.cli import main

OPTIONS = {"max_steps": 6, "save_steps": 2}
FILES = (
    "loop_state.json",
    "manifest.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)
FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
RELEASES = sorted(path.name for path in FIXTURES.iterdir())


def damages(content, other=None):
    """Name -> damaged bytes (None: the file is gone)."""
    length = len(content)
    flips = sorted({0, 7, length // 4, length // 2, 3 * length // 4, length - 2})
    cases = {"missing": None, "emptied": b""}
    for cut in sorted({1, length // 3, length // 2, length - 2}):
        cases[f"truncated at {cut}"] = content[:cut]
    for place in flips:
        cases[f"bit flipped at {place}"] = (
            content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
        )
    if other is not None and other != content:
        cases["of another step"] = other
    return cases


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints 2, 4 and 6, and how a resume from each ends."""
    out = tmp_path_factory.mktemp("finished") / "out"
    make_run(out, **OPTIONS).train()
    return out


@pytest.fixture
def out(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "out"))


def write(path, content):
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_named_and_the_older_checkpoint_is_taken(
    finished, tmp_path, caplog, capsys, name
):
    assert sorted(os.listdir(finished / "checkpoint-6")) == sorted(FILES)
    content = (finished / "checkpoint-6" / name).read_bytes()
    cases = damages(content, (finished / "checkpoint-4" / name).read_bytes())
    assert len(cases) >= 11
    for case, damaged in cases.items():
        out = tmp_path / "out"
        shutil.copytree(finished, out)
        write(out / "checkpoint-6" / name, damaged)
        assert main(["check", str(out)]) == 1, case
        printed = capsys.readouterr().out
        assert f"{out}/checkpoint-6: DAMAGED" in printed and f"{out}/checkpoint-4: good" in printed, case
        assert name in printed.partition("DAMAGED")[2], case
        with pytest.raises(ValueError, match=f"(?s)cannot be used: .*{name}.*newest good .*checkpoint-4"):
            find_resumable(out / "checkpoint-6", is_explicit=True)
        caplog.clear()
        assert find_resumable(out, is_explicit=False) == str(out / "checkpoint-4"), case
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and "IS DAMAGED" in record.message and name in record.message, case
        assert (out / "checkpoint-6.damaged").is_dir(), case
        shutil.rmtree(out)


@pytest.mark.parametrize("how", ["missing", "emptied", "truncated at 1", "bit flipped at 7", "of another step"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "manifest.json"])
def test_a_run_that_falls_back_ends_like_a_resume_from_the_older_checkpoint(finished, out, tmp_path, name, how):
    expected = make_run(tmp_path / "older", **OPTIONS)
    shutil.copytree(finished / "checkpoint-4", tmp_path / "older" / "checkpoint-4")
    expected.train(resume_from_checkpoint=True)
    path = out / "checkpoint-6" / name
    write(path, damages(path.read_bytes(), (out / "checkpoint-4" / name).read_bytes())[how])
    resumed = make_run(out, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._run.first_step == expected._run.first_step == 4
    assert difference(end_of(expected), end_of(resumed)) == ""
    # The step is done again, so its checkpoint is there again, and whole; the damaged one is kept.
    assert sorted(os.listdir(out)) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-6.damaged",
        "metrics.jsonl",
        "training_report.html",
    ]
    assert problems(out / "checkpoint-6") == []


def test_two_damaged_checkpoints_cost_two_intervals_and_no_more(out, tmp_path):
    for step in (4, 6):
        write(out / f"checkpoint-{step}" / "optimizer.pt", None)
    resumed = make_run(out, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._run.first_step == 2 and resumed.state.global_step == 6


def test_a_directory_in_place_of_a_file_and_a_file_that_was_added_are_found(out):
    newest = out / "checkpoint-6"
    (newest / "optimizer.pt").unlink()
    (newest / "optimizer.pt").mkdir()
    (newest / "pytorch_model.bin").write_bytes(b"x")
    found = problems(newest)
    assert len(found) == 2 and "optimizer.pt" in found[0] and "pytorch_model.bin is not in the manifest" in found[1]


def test_the_command_says_the_same_as_the_resume_in_a_process_of_its_own(out):
    write(out / "checkpoint-6" / "rng_state.pth", b"")
    done = subprocess.run(
        [sys.executable, "-m", "trainwright", "check", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "rng_state.pth is empty" in done.stdout and done.stdout.count("good") == 2
    shutil.rmtree(out / "checkpoint-6")
    assert main(["check", str(out)]) == 0


# -- without a manifest ------------------------------------------------------------------------------------------------


def loaded(path):
    return tensors_of(load_tensors(path, mmap=False))


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_without_manifest_damage_of_a_torch_file_is_found_or_changes_nothing(tmp_path, release, name):
    checkpoint = Path(shutil.copytree(FIXTURES / release / "checkpoint-2", tmp_path / "checkpoint-2"))
    path = checkpoint / name
    content = path.read_bytes()
    expected, whole = loaded(path), repr(load_tensors(path, mmap=False))
    step = max(1, len(content) // 97)
    found = 0
    for place in range(0, len(content), step):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        if problems(checkpoint):
            assert name in problems(checkpoint)[0]
            found += 1
            continue
        again = loaded(path)  # a bit of padding, or of a field that nobody reads
        assert again.keys() == expected.keys() and all(torch.equal(again[key], expected[key]) for key in expected)
        assert repr(load_tensors(path, mmap=False)) == whole
    assert found > 10
    for cut in range(0, len(content), step):
        path.write_bytes(content[:cut])
        assert problems(checkpoint) and name in problems(checkpoint)[0]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "config.json"])
def test_without_manifest_a_truncated_file_is_found_wherever_it_ends(tmp_path, release, name):
    checkpoint = Path(shutil.copytree(FIXTURES / release / "checkpoint-2", tmp_path / "checkpoint-2"))
    content = (checkpoint / name).read_bytes()
    for cut in range(0, len(content.rstrip()), max(1, len(content) // 50)):
        (checkpoint / name).write_bytes(content[:cut])
        assert problems(checkpoint) and name in problems(checkpoint)[0], cut


@pytest.mark.parametrize("release", RELEASES)
def test_without_manifest_the_state_of_another_step_is_found(tmp_path, release):
    checkpoint = Path(shutil.copytree(FIXTURES / release / "checkpoint-2", tmp_path / "checkpoint-4"))
    assert problems(checkpoint) == ["trainer_state.json belongs to step 2, not to step 4"]
    renamed = checkpoint.rename(tmp_path / "my-best-model")  # a name without a step promises none
    assert problems(renamed) == []


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_without_manifest_a_missing_file_sends_the_resume_to_the_older_checkpoint(tmp_path, caplog, release, name):
    for step in (2, 4):
        checkpoint = Path(shutil.copytree(FIXTURES / release / "checkpoint-2", tmp_path / f"checkpoint-{step}"))
        state = checkpoint / "trainer_state.json"
        state.write_text(state.read_text().replace('"global_step": 2', f'"global_step": {step}'))
    assert find_resumable(tmp_path, is_explicit=False) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / name).unlink()
    assert find_resumable(tmp_path, is_explicit=False) == str(tmp_path / "checkpoint-2")
    assert "IS DAMAGED" in caplog.text and (name in caplog.text or "the weights are missing" in caplog.text)


def test_the_manifest_cannot_be_taken_away_to_avoid_the_hashes(out):
    (out / "checkpoint-6" / "manifest.json").unlink()
    assert "manifest.json is missing" in problems(out / "checkpoint-6")[0]
