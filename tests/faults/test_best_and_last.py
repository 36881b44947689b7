"""`best` and `last` are always found, wherever the run was moved; rotation deletes neither, nor what is not ours."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from runs import LineModel, difference, end_of, make_run, train

from trainwright import TrainerCallback
from trainwright.checkpoint import layout
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.weights import load_weights
from trainwright.cli import main

# The first evaluation has the highest loss, so the best checkpoint is the oldest one: rotation has to go round it.
BEST = {
    "max_steps": 5,
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}


def listed(out, capsys):
    """What `trainwright list` prints: name -> marks."""
    capsys.readouterr()
    assert main(["list", str(out)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "checkpoint-" in line]
    return {next(word for word in row if word.startswith("checkpoint-")): {"best", "last"} & set(row) for row in rows}


def best_step(run):
    losses = {line["step"]: line["eval_loss"] for line in run.state.log_history if "eval_loss" in line}
    return max(losses, key=losses.get)


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
def test_best_and_last_are_marked_whatever_was_rotated(tmp_path, capsys, limit):
    run = make_run(tmp_path, **BEST, save_total_limit=limit)
    run.train()
    best = best_step(run)
    assert best < 4  # neither the last nor the one before
    marks = listed(tmp_path, capsys)
    assert marks[f"checkpoint-{best}"] == {"best"} and marks["checkpoint-5"] == {"last"}
    assert len(marks) == {None: 5, 1: 2}.get(limit, limit)
    assert all(problems(tmp_path / name) == [] for name in marks)


def test_a_moved_run_still_has_its_best_and_resumes_with_it(tmp_path, capsys):
    whole = make_run(tmp_path / "whole", **BEST, save_total_limit=1)
    whole.train()
    best = best_step(whole)
    old, new = tmp_path / "old", tmp_path / "disk" / "new"
    make_run(old, **{**BEST, "load_best_model_at_end": False}).train()
    shutil.rmtree(old / "checkpoint-5")
    new.parent.mkdir()
    os.rename(old, new)
    assert listed(new, capsys)[f"checkpoint-{best}"] == {"best"}
    moved = make_run(new, **BEST, save_total_limit=1)
    moved.train(resume_from_checkpoint=True)
    assert moved._run.first_step == 4
    assert difference(end_of(whole), end_of(moved)) == ""  # the weights are those of the best checkpoint
    assert moved.state.best_model_checkpoint == str(new / f"checkpoint-{best}")
    assert listed(new, capsys) == {f"checkpoint-{best}": {"best"}, "checkpoint-5": {"last"}}


def test_the_best_model_is_loaded_after_a_move_and_no_further_step(tmp_path):
    options = {**BEST, "load_best_model_at_end": False}
    make_run(tmp_path / "old", **options).train()
    os.rename(tmp_path / "old", tmp_path / "new")
    run = make_run(tmp_path / "new", **BEST)
    run.train(resume_from_checkpoint=True)
    expected = make_run(tmp_path / "other").model
    load_weights(expected, tmp_path / "new" / f"checkpoint-{best_step(run)}")
    found = run.model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.state_dict().items())


def test_a_copied_run_loads_its_best_from_its_new_place(tmp_path, capsys):
    """The old place is still there, and has become another run's since."""
    options = {**BEST, "load_best_model_at_end": False}
    old, copy = tmp_path / "old", tmp_path / "copy"
    best = best_step(train(old, **options))
    shutil.copytree(old, copy)
    shutil.rmtree(old)
    train(old, **{**options, "learning_rate": 0.01})
    assert listed(copy, capsys)[f"checkpoint-{best}"] == {"best"}
    expected, others = (make_run(tmp_path / "other").model for _ in range(2))
    load_weights(expected, copy / f"checkpoint-{best}")
    load_weights(others, old / f"checkpoint-{best}")
    assert not torch.equal(expected.linear.weight, others.linear.weight)
    # At once, after a further step, and as a run of its own that begins at an older checkpoint.
    for max_steps, resumed in ((5, True), (6, True), (6, str(copy / "checkpoint-4"))):
        run = make_run(copy, **{**BEST, "max_steps": max_steps, "save_total_limit": None if max_steps == 5 else 4})
        run.train(resume_from_checkpoint=resumed)
        assert best_step(run) == best
        assert all(map(torch.equal, run.model.state_dict().values(), expected.state_dict().values()))
        if max_steps == 6:
            assert run.state.best_model_checkpoint == str(copy / f"checkpoint-{best}")
            assert listed(copy, capsys)[f"checkpoint-{best}"] == {"best"}


def test_a_damaged_best_checkpoint_is_never_loaded(tmp_path, caplog):
    make_run(tmp_path, **{**BEST, "load_best_model_at_end": False}).train()
    run = make_run(tmp_path, **BEST)
    last = make_run(tmp_path / "other").model
    load_weights(last, tmp_path / "checkpoint-5")
    state = last.state_dict()
    again = make_run(tmp_path, **{**BEST, "load_best_model_at_end": False})
    again.train(resume_from_checkpoint=True)
    weights = tmp_path / f"checkpoint-{best_step(again)}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # a number, which loads as well as any other
    weights.write_bytes(content)
    run.train(resume_from_checkpoint=True)
    assert "THE BEST CHECKPOINT" in caplog.text and "model.safetensors has changed" in caplog.text
    assert all(torch.equal(tensor, run.model.state_dict()[name]) for name, tensor in state.items())


def others(out):
    """Directories and files of the user, some of them in the way; and what they hold."""
    for name in ("checkpoint-1", "checkpoint-99", "checkpoint-2-keep", "notes"):
        (out / name).mkdir(parents=True)
        (out / name / "thesis.txt").write_text(name)
    (out / "checkpoint-98").symlink_to(out / "notes")
    (out / "checkpoint-97").write_text("a file")


def test_nothing_that_we_did_not_write_is_ever_deleted(tmp_path, capsys, caplog):
    others(tmp_path)
    run = make_run(tmp_path, max_steps=4, save_steps=1, save_total_limit=1)
    run.train()
    run.save_model()
    texts = {path.read_text() for path in Path(tmp_path).glob("*/thesis.txt")}
    assert texts == {"checkpoint-1", "checkpoint-99", "checkpoint-2-keep", "notes"}
    assert (tmp_path / "checkpoint-98").is_symlink() and (tmp_path / "checkpoint-97").read_text() == "a file"
    # The one in the way of a checkpoint was moved aside, and that was said.
    assert (tmp_path / "checkpoint-1.not-ours-1" / "thesis.txt").exists()
    assert "checkpoint-1 was in the way of a checkpoint" in caplog.text
    assert not (tmp_path / "checkpoint-1").exists() and problems(tmp_path / "checkpoint-4") == []
    again = make_run(tmp_path, max_steps=6, save_steps=1, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert again._run.first_step == 4
    assert {path.read_text() for path in Path(tmp_path).glob("*/thesis.txt")} == texts


def test_the_list_names_the_last_of_ours_beside_directories_of_the_user(tmp_path, capsys):
    others(tmp_path)
    make_run(tmp_path, max_steps=2, save_steps=1).train()
    marks = listed(tmp_path, capsys)
    assert marks["checkpoint-2"] == {"last"} and "checkpoint-99" not in marks


def test_the_list_says_which_checkpoint_is_damaged_and_does_not_call_it_last(tmp_path, capsys):
    run = make_run(tmp_path, **BEST)
    run.train()
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    marks = listed(tmp_path, capsys)
    assert marks["checkpoint-5"] == set() and marks["checkpoint-4"] == {"last"}
    assert marks[f"checkpoint-{best_step(run)}"] == {"best"}
    assert main(["list", str(tmp_path)]) == 0
    assert "DAMAGED" in capsys.readouterr().out


def test_the_checkpoint_just_written_stays_where_a_run_went_back_and_left_higher_numbers(tmp_path):
    make_run(tmp_path, max_steps=4, save_steps=2).train()
    run = make_run(tmp_path, max_steps=3, save_steps=1, save_total_limit=1)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert problems(tmp_path / "checkpoint-3") == [] and sorted(os.listdir(tmp_path)) == [
        "checkpoint-3",
        "metrics.jsonl",
        "training_report.html",
    ]


# ------------------------------------------------------------------------------------------- several runs in one place


def kill_at(step):
    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise ConnectionAbortedError("killed")

    return {"callbacks": [Kill()]}


def names(out):
    return sorted(path.name for path in Path(out).glob("checkpoint-*"))


def without_record(out):
    """As an older release, or another implementation, leaves its checkpoints."""
    for path in Path(out).glob("checkpoint-*"):
        (path / "loop_state.json").unlink()
        (path / "manifest.json").unlink()


@pytest.mark.parametrize("is_foreign", [False, True], ids=["ours", "of another implementation"])
def test_a_run_keeps_and_resumes_its_own_checkpoints_where_an_older_one_came_further(tmp_path, is_foreign):
    make_run(tmp_path, max_steps=8, save_steps=2).train()
    if is_foreign:
        without_record(tmp_path)
    options = {"max_steps": 7, "save_steps": 1, "save_total_limit": 2, "learning_rate": 0.05}
    with pytest.raises(ConnectionAbortedError):
        make_run(tmp_path, trainer=kill_at(1), **options).train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-8"]
    again = make_run(tmp_path, trainer=kill_at(3), **options)
    with pytest.raises(ConnectionAbortedError):
        again.train(resume_from_checkpoint="auto")
    assert again._run.first_step == 1 and names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    whole = make_run(tmp_path / "whole", **options)
    whole.train()
    again = make_run(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again._run.first_step == 3 and names(tmp_path) == ["checkpoint-6", "checkpoint-7"]
    assert difference(end_of(whole), end_of(again)) == ""


def test_what_is_passed_over_is_named_and_can_be_resumed_from(tmp_path, caplog, capsys):
    make_run(tmp_path, max_steps=4, save_steps=2).train()
    make_run(tmp_path, max_steps=1, save_steps=1).train()
    run = make_run(tmp_path, max_steps=3, save_steps=1)
    run.train(resume_from_checkpoint=True)
    assert run._run.first_step == 1
    assert "checkpoint-2, checkpoint-4 were written by an earlier one" in caplog.text
    assert f"resume_from_checkpoint={str(tmp_path / 'checkpoint-4')!r}" in caplog.text
    assert listed(tmp_path, capsys)["checkpoint-3"] == {"last"}
    assert main(["list", str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "earlier" in line] == ["checkpoint-4"]
    last = make_run(tmp_path, max_steps=6, save_steps=1, save_total_limit=1)
    last.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # the newest run from now on
    assert last._run.first_step == 4 and names(tmp_path) == ["checkpoint-6"]


def test_a_run_that_goes_back_is_the_newest_from_there_on(tmp_path):
    make_run(tmp_path, max_steps=6, save_steps=2).train()
    with pytest.raises(ConnectionAbortedError):
        back = make_run(tmp_path, max_steps=6, save_steps=1, trainer=kill_at(3))
        back.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = make_run(tmp_path, max_steps=6, save_steps=1, save_total_limit=3)
    again.train(resume_from_checkpoint="auto")
    assert again._run.first_step == 3 and names(tmp_path) == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_a_run_from_a_checkpoint_of_another_directory_is_one_of_its_own(tmp_path):
    make_run(tmp_path / "first", max_steps=4, save_steps=2).train()
    make_run(tmp_path / "second", max_steps=8, save_steps=8).train()
    run = make_run(tmp_path / "second", max_steps=6, save_steps=1, save_total_limit=2)
    run.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert names(tmp_path / "second") == ["checkpoint-5", "checkpoint-6"]
    again = make_run(tmp_path / "second", max_steps=7, save_steps=1)
    again.train(resume_from_checkpoint="auto")
    assert again._run.first_step == 6 and names(tmp_path / "first") == ["checkpoint-2", "checkpoint-4"]


def test_a_copied_directory_goes_on_as_the_run_that_it_was(tmp_path):
    make_run(tmp_path / "first", max_steps=4, save_steps=2).train()
    make_run(tmp_path / "first", max_steps=3, save_steps=3).train()
    shutil.copytree(tmp_path / "first", tmp_path / "copy", copy_function=shutil.copyfile)  # without any time
    run = make_run(tmp_path / "copy", max_steps=5, save_steps=1, save_total_limit=2)
    run.train(resume_from_checkpoint=True)
    assert run._run.first_step == 3 and names(tmp_path / "copy") == ["checkpoint-4", "checkpoint-5"]


def test_a_checkpoint_that_another_implementation_wrote_later_is_the_newest(tmp_path):
    make_run(tmp_path, max_steps=2, save_steps=1).train()
    make_run(tmp_path / "other", max_steps=4, save_steps=4).train()
    without_record(tmp_path / "other")
    os.rename(tmp_path / "other" / "checkpoint-4", tmp_path / "checkpoint-4")
    run = make_run(tmp_path, max_steps=5, save_steps=1, save_total_limit=2)
    run.train(resume_from_checkpoint=True)
    assert run._run.first_step == 4 and names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_a_clock_that_was_put_back_does_not_make_a_new_run_an_older_one(tmp_path, monkeypatch):
    make_run(tmp_path, max_steps=4, save_steps=2).train()
    monkeypatch.setattr(layout, "time", SimpleNamespace(time_ns=lambda: 0))
    make_run(tmp_path, max_steps=2, save_steps=1, save_total_limit=2).train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_trials_of_a_search_are_runs_of_their_own_directories(tmp_path):
    pytest.importorskip("optuna")
    search = make_run(tmp_path, max_steps=2, save_steps=1, save_total_limit=1, eval_strategy="epoch",
                      trainer={"model": None, "model_init": LineModel})  # fmt: skip
    search.hyperparameter_search(hp_space=lambda trial: {"seed": trial.suggest_int("seed", 1, 9)}, n_trials=2)
    assert [names(folder) for folder in sorted(tmp_path.glob("run-*"))] == [["checkpoint-2"]] * 2


def test_a_best_checkpoint_of_another_directory_is_not_confused_with_one_of_the_same_number_here(tmp_path):
    options = {**BEST, "load_best_model_at_end": False, "max_steps": 4}
    best = best_step(train(tmp_path / "first", **options))
    train(tmp_path / "second", **{**options, "learning_rate": 0.01})
    run = make_run(tmp_path / "second", **{**BEST, "max_steps": 5})
    run.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    assert best_step(run) == best
    expected = make_run(tmp_path / "other").model
    load_weights(expected, tmp_path / "first" / f"checkpoint-{best}")
    assert torch.equal(expected.linear.weight, run.model.linear.weight)
