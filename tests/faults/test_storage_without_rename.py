"""Storage that cannot rename directories (object stores, bind mounts): a copy under a mark, and the same promises."""

import errno
import os
import shutil
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from runs import complete_steps, difference, end_of, make_run, resume_or_start, run_and_die

from trainwright.checkpoint.layout import sort_checkpoints
from trainwright.checkpoint.manifest import problems

REAL = {"rename": os.rename, "replace": os.replace}


@pytest.fixture(params=[errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EMFILE], ids=errno.errorcode.get)
def storage(request, monkeypatch):
    """`os` as on a storage where directories (and, where it says ENOSYS, files too) have one name for ever."""
    forbid(request.param, monkeypatch.setattr)
    return request.param


def forbid(code, patch):
    for name, function in REAL.items():

        def fails(source, target, *rest, function=function, **keywords):
            if os.path.isdir(source) or code == errno.ENOSYS:
                raise OSError(code, os.strerror(code), os.fspath(source))
            return function(source, target, *rest, **keywords)

        patch(os, name, fails)


ROTATING = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2}


def test_a_run_rotates_resumes_and_ends_as_on_a_disk(tmp_path, storage):
    expected = end_of(finished(make_run(tmp_path / "whole", **{**ROTATING, "save_total_limit": None})))
    out = tmp_path / "out"
    whole = finished(make_run(out, **ROTATING))
    whole.save_model()
    assert difference(expected, end_of(whole)) == ""
    assert sorted(os.listdir(out)) == [
        "checkpoint-3",
        "checkpoint-4",
        "metrics.jsonl",
        "model.safetensors",
        "training_args.bin",
        "training_report.html",
    ]
    shutil.rmtree(out / "checkpoint-4")
    again = make_run(out, **ROTATING)
    again.train(resume_from_checkpoint=True)
    assert again._run.first_step == 3 and difference(expected, end_of(again)) == ""


def test_the_best_checkpoint_survives_the_rotation(tmp_path, storage):
    best = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    run = finished(make_run(tmp_path, **{**ROTATING, "save_total_limit": 1, **best}))
    kept = {os.path.basename(run.state.best_model_checkpoint), "checkpoint-4"}
    assert {name for name in os.listdir(tmp_path) if name.startswith("checkpoint-")} == kept


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_replaced(tmp_path, storage, caplog):
    finished(make_run(tmp_path, **ROTATING))
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    again = make_run(tmp_path, **ROTATING)
    again.train(resume_from_checkpoint=True)
    assert again._run.first_step == 3 and "optimizer.pt is missing" in caplog.text
    assert problems(tmp_path / "checkpoint-4") == []


def test_what_is_in_the_way_and_not_ours_is_an_error_that_says_so(tmp_path, storage):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"checkpoint-1 is in the way .* not written by a Trainer"):
        make_run(tmp_path, **ROTATING).train()
    assert (
        sorted(os.listdir(tmp_path)) == ["checkpoint-1", "metrics.jsonl", "training_report.html"]
        and (tmp_path / "checkpoint-1" / "thesis.txt").exists()
    )


def finished(run):
    run.train()
    return run


def test_a_run_killed_at_any_call_resumes_from_the_newest_complete_copy(tmp_path, monkeypatch):
    forbid(errno.EXDEV, monkeypatch.setattr)
    options = {**ROTATING, "max_steps": 2, "save_total_limit": 1}
    expected = end_of(finished(make_run(tmp_path / "whole", **options)))
    out = tmp_path / "out"

    def action(trainers):
        trainers.append(make_run(out, **options))
        trainers[0].train()

    point, seen = 0, set()
    while True:
        point += 1
        shutil.rmtree(out, ignore_errors=True)
        step = run_and_die(action, point)
        if step is None:
            break
        if step < 2:  # the first save, and what a killed one leaves: as the second
            continue
        complete = complete_steps(out)
        assert complete and max(complete) >= 1, point
        for path in sort_checkpoints(out):
            assert problems(path) == [] or os.listdir(path) == [], point  # what cannot be used is not seen
        again = make_run(out, **options)
        assert resume_or_start(again), point
        assert again._run.first_step == max(complete), point
        but = ("random",) if max(complete) == 2 else ()
        assert difference(expected, end_of(again), but) == "", point
        seen.add(max(complete))
        if len(complete) > 1 and again._run.first_step == 1:  # nothing half is left once the run is through
            assert sorted(os.listdir(out)) == ["checkpoint-2", "metrics.jsonl", "training_report.html"], point
        assert not any(".staged" in name or ".deleted" in name for name in os.listdir(out)), point
    assert seen == {1, 2} and point > 80
