"""Metrics by name, comparisons, and finding the best checkpoint again."""

import json
import logging
import math
import os
import shutil
import types

import pytest

from trainwright.checkpoint.best import (
    MetricNotFound,
    best_directory,
    has_metric,
    is_better,
    list_run,
    locate,
    metric_value,
    note_metric,
    resumed,
    undamaged,
    was_saved,
)
from trainwright.checkpoint.manifest import write_manifest
from trainwright.names import SaveStrategy
from trainwright.state import TrainerState


@pytest.mark.parametrize("name", ["accuracy", "eval_accuracy"])
def test_a_metric_is_found_with_and_without_its_prefix(name):
    assert metric_value({"eval_accuracy": 0.5, "eval_loss": 2}, name) == 0.5
    assert metric_value({"accuracy": 0.25}, name) == 0.25


def test_an_unknown_metric_is_reported_with_what_is_there_and_the_nearest():
    with pytest.raises(MetricNotFound) as error:
        metric_value({"eval_accuracy": 0.5, "eval_loss": 2.0}, "acuracy")
    assert isinstance(error.value, KeyError) and isinstance(error.value, ValueError)
    assert "['eval_accuracy', 'eval_loss']" in str(error.value)
    assert "Did you mean 'eval_accuracy'?" in str(error.value)


def test_nan_is_never_better_and_anything_beats_nan():
    nan = math.nan
    assert not is_better(nan, None, True) and not is_better(nan, 0.1, False) and not is_better(nan, nan, True)
    assert is_better(-1.0, None, True) and is_better(-1.0, nan, True)


def test_the_direction_and_the_threshold_decide():
    assert is_better(2.0, 1.0, True) and not is_better(2.0, 1.0, False)
    assert not is_better(1.0, 1.0, True) and not is_better(1.0, 1.0, False)
    assert not is_better(1.25, 1.0, True, threshold=0.25) and is_better(1.5, 1.0, True, threshold=0.25)
    assert is_better(0.5, 1.0, False, threshold=0.25) and not is_better(0.75, 1.0, False, threshold=0.25)


def test_the_best_checkpoint_is_found_after_the_output_directory_moved(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "checkpoint-4").mkdir(parents=True)
    best = str(old / "checkpoint-4")
    assert locate(best, old) == best
    old.rename(new)
    assert locate(best, new) == str(new / "checkpoint-4")
    assert locate(best, tmp_path) is None
    assert locate(None, new) is None


def make(output_dir, step, best=None, run=("a", 1)):
    """A whole checkpoint of 7 + n bytes and its manifest, written by a run of this name that began then."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    state = {"global_step": step, "best_model_checkpoint": best}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "scheduler.pt").write_bytes(b"x")  # shallow checks alone: what is in it does not matter
    loop = {"position": {"epoch": 0, "samples_in_epoch": 0}, "window": {"sum": 0.0, "num_losses": 0}}
    record = {"id": run[0], "started_ns": run[1]}
    (folder / "loop_state.json").write_text(json.dumps(loop | {"total_loss": 0, "last_logged_step": 0, "run": record}))
    write_manifest(folder, step, 1, {})
    return folder


def num_bytes(folder):
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def listed(output_dir):
    return {one.name: one.marks for one in list_run(output_dir)}


def test_a_run_is_listed_with_its_best_and_its_last_and_the_size_of_each(tmp_path):
    folders = [make(tmp_path, step, best="elsewhere/checkpoint-4") for step in (2, 4, 10)]
    (tmp_path / "checkpoint-1").mkdir()  # not ours
    assert [(one.name, one.num_bytes, one.marks) for one in list_run(tmp_path)] == [
        ("checkpoint-2", num_bytes(folders[0]), []),
        ("checkpoint-4", num_bytes(folders[1]), ["best"]),
        ("checkpoint-10", num_bytes(folders[2]), ["last"]),
    ]


def test_the_last_of_a_run_is_the_newest_that_is_whole_and_knows_the_best(tmp_path):
    make(tmp_path, 2, best="checkpoint-2")
    make(tmp_path, 4, best="checkpoint-4")
    (make(tmp_path, 6, best="checkpoint-6") / "model.safetensors").write_bytes(b"")
    assert listed(tmp_path) == {"checkpoint-2": [], "checkpoint-4": ["last", "best"], "checkpoint-6": ["DAMAGED"]}
    (make(tmp_path, 8) / "trainer_state.json").write_text("{")
    assert listed(tmp_path)["checkpoint-8"] == ["DAMAGED"]
    assert listed(tmp_path)["checkpoint-4"] == ["last", "best"]


def test_a_list_compares_sizes_and_reads_no_weights(tmp_path):
    (make(tmp_path, 2) / "model.safetensors").write_bytes(b"WEIGHTS")  # of the same size
    assert listed(tmp_path) == {"checkpoint-2": ["last"]}


def test_where_nothing_is_whole_nothing_is_the_best_wherever_one_is(tmp_path, monkeypatch):
    folder = make(tmp_path, 2, best="checkpoint-2")
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(folder)
    assert listed(tmp_path) == {"checkpoint-2": ["DAMAGED"]}


def test_a_checkpoint_without_a_state_is_listed_and_names_no_best(tmp_path):
    folder = make(tmp_path, 2)
    (folder / "trainer_state.json").unlink()
    write_manifest(folder, 2, 1, {})
    assert listed(tmp_path) == {"checkpoint-2": ["last"]}
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert listed(tmp_path) == {"checkpoint-2": ["DAMAGED"]}


def test_checkpoints_of_an_earlier_run_are_listed_as_that(tmp_path):
    make(tmp_path, 2, run=("new", 2))
    make(tmp_path, 9, run=("old", 1))
    assert listed(tmp_path) == {"checkpoint-2": ["last"], "checkpoint-9": ["(an earlier run)"]}


def test_a_link_is_listed_and_not_followed(tmp_path):
    make(tmp_path / "other", 4)
    make(tmp_path, 5)
    (tmp_path / "checkpoint-4").symlink_to(tmp_path / "other" / "checkpoint-4")
    (link,) = list_run(tmp_path)[1:]
    assert (link.name, link.num_bytes, link.metric, link.marks) == ("checkpoint-4", 0, "", ["(a link, not followed)"])
    assert list_run(tmp_path / "other" / "checkpoint-4") == []


@pytest.mark.parametrize("name", ["accuracy", "eval_accuracy"])
@pytest.mark.parametrize("there", ["accuracy", "eval_accuracy"])
def test_a_metric_is_there_with_and_without_its_prefix(name, there):
    assert has_metric({there: 0.5}, name) and not has_metric({"eval_loss": 0.5}, name)


def test_of_two_spellings_of_a_metric_that_of_the_evaluation_counts():
    assert metric_value({"accuracy": 0.1, "eval_accuracy": 0.5}, "accuracy") == 0.5
    found = metric_value({"eval_accuracy": "0.5"}, "accuracy")
    assert (found, type(found)) == (0.5, float)


def test_a_metric_without_a_prefix_is_suggested_too():
    with pytest.raises(MetricNotFound, match="Did you mean 'f1_macro'"):
        metric_value({"f1_macro": 0.5}, "eval_f1_makro")


@pytest.mark.parametrize(
    "path",
    ["checkpoint-4", "/gone/checkpoint-4/", "C:\\runs\\checkpoint-4", "C:\\runs\\checkpoint-4\\", "a/checkpoint-4//"],
)
def test_of_a_remembered_path_only_the_name_counts(tmp_path, path):
    (tmp_path / "checkpoint-4").mkdir()
    assert locate(path, tmp_path) == str(tmp_path / "checkpoint-4")
    assert locate(path) is None


@pytest.mark.parametrize(
    "path", ["", 4, ["checkpoint-4"], "weights", "..", "checkpoint-4X/", "checkpoint-4\0", "checkpoint-4/weights"]
)
def test_what_is_no_name_of_a_checkpoint_is_found_nowhere(tmp_path, path):
    for name in ("checkpoint-4", "weights"):
        (tmp_path / name).mkdir()
    assert locate(path, tmp_path) is None


def test_the_directory_that_is_remembered_comes_before_the_others(tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for folder in (one, two):
        (folder / "checkpoint-4").mkdir(parents=True)
    assert locate(str(two / "checkpoint-4"), one, two) == str(two / "checkpoint-4")
    assert locate(str(three / "checkpoint-4"), one, two) == str(one / "checkpoint-4")
    assert locate(str(three / "checkpoint-4"), two, one) == str(two / "checkpoint-4")
    (one / "checkpoint-5").symlink_to(two / "checkpoint-4")
    assert locate("checkpoint-5", one) is None


def test_a_directory_is_of_this_run_by_the_run_or_by_what_was_known(tmp_path):
    folder = make(tmp_path, 4, run=("a", 1))
    assert was_saved(str(folder), None, {"id": "a", "started_ns": 1})
    assert not was_saved(str(folder), None, {"id": "b", "started_ns": 1})
    assert was_saved(str(folder), str(folder), {"id": "b", "started_ns": 1})
    assert not was_saved(str(folder), str(tmp_path), None)


def test_the_best_of_a_resumed_run_lies_beside_its_checkpoint_or_in_the_run(tmp_path, caplog):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run, elsewhere):
        (folder / "checkpoint-4").mkdir(parents=True)
    checkpoint = str(elsewhere / "checkpoint-8")
    assert resumed("gone/checkpoint-4", checkpoint, run) == str(elsewhere / "checkpoint-4")
    (elsewhere / "checkpoint-4").rmdir()
    assert resumed("gone/checkpoint-4", checkpoint, run) == str(run / "checkpoint-4")
    (run / "checkpoint-4").rmdir()
    for path in ("gone/checkpoint-4", "C:\\gone\\checkpoint-4\\"):
        assert resumed(path, checkpoint, run) == str(run / "checkpoint-4")  # gone, which is said when it is wanted
    assert resumed(None, checkpoint, run) is None
    assert caplog.records == []
    assert resumed("gone/weights", checkpoint, run) is None
    assert f"{checkpoint} names gone/weights as its best checkpoint" in caplog.text
    assert resumed("gone/checkpoint-4X/", checkpoint, run) is None


def test_the_best_of_a_resumed_run_is_found_from_any_working_directory(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resumed("gone/checkpoint-4", "checkpoint-8", "run") == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(("then", "said"), [(None, "the model keeps its last weights"), ("nothing is sent", None)])
def test_a_best_checkpoint_that_cannot_be_read_is_named_with_what_follows(tmp_path, caplog, then, said):
    best = tmp_path / "checkpoint-4"
    assert undamaged(str(best), tmp_path, then=then) is None
    assert f"The best checkpoint, {best}, is gone; {said or then}." in caplog.text
    best.mkdir()
    caplog.clear()
    assert undamaged(str(best), tmp_path, then=then) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"THE BEST CHECKPOINT {best} IS DAMAGED; {said or then}: " in record.getMessage()
    assert f"trainwright check --accept {best}" in record.getMessage()


def test_a_best_checkpoint_that_is_whole_is_read(tmp_path, caplog):
    best = tmp_path / "checkpoint-4"
    best.mkdir()
    (best / "model.safetensors").write_bytes(b"weights")
    write_manifest(best, 4, 1, {})
    assert undamaged("gone/checkpoint-4", tmp_path) == str(best)
    assert caplog.records == []
    (best / "model.safetensors").write_bytes(b"WEIGHTS")  # of the same size
    assert undamaged("gone/checkpoint-4", tmp_path) is None


def judging(name="accuracy", greater=True, save_strategy="steps"):
    return types.SimpleNamespace(metric_for_best_model=name, greater_is_better=greater, save_strategy=save_strategy)


def test_a_better_metric_is_noted_with_its_step_and_another_is_not():
    state = TrainerState(global_step=4, best_metric=0.5, best_global_step=2)
    assert note_metric(state, judging(), {"eval_accuracy": 0.25}, is_needed=True) is False
    assert (state.best_metric, state.best_global_step) == (0.5, 2)
    assert note_metric(state, judging(greater=False), {"eval_accuracy": 0.25}, is_needed=True) is True
    assert (state.best_metric, state.best_global_step) == (0.25, 4)
    state.global_step = 6
    assert note_metric(state, judging(), {"eval_accuracy": 0.75}, is_needed=False) is True
    assert (state.best_metric, state.best_global_step) == (0.75, 6)


@pytest.mark.parametrize(("save_strategy", "step"), [("no", None), ("steps", 4), ("epoch", 4), ("best", 4)])
def test_the_best_step_is_noted_by_runs_that_save(save_strategy, step):
    state = TrainerState(global_step=4)
    args = judging(save_strategy=SaveStrategy(save_strategy))
    assert note_metric(state, args, {"accuracy": 0.5}, is_needed=True) is True
    assert (state.best_metric, state.best_global_step) == (0.5, step)


def test_a_metric_that_is_not_there_is_an_error_where_the_run_needs_it():
    state = TrainerState(global_step=4)
    assert note_metric(state, judging(name=None), {"eval_loss": 0.5}, is_needed=True) is False
    assert note_metric(state, judging(), {"eval_loss": 0.5}, is_needed=False) is False
    with pytest.raises(MetricNotFound):
        note_metric(state, judging(), {"eval_loss": 0.5}, is_needed=True)
    assert state.best_metric is None


def test_the_best_checkpoint_is_that_of_the_best_step_if_this_run_saves_or_saved_it(tmp_path):
    run, known = {"id": "this", "started_ns": 1}, str(tmp_path / "elsewhere" / "checkpoint-1")
    there = tmp_path / "checkpoint-2"
    there.mkdir()
    state = TrainerState(global_step=4, best_global_step=4, best_model_checkpoint=known)
    assert best_directory(state, str(tmp_path), run) == str(tmp_path / "checkpoint-4")
    state.best_global_step = 2
    assert best_directory(state, str(tmp_path), run) == known  # an earlier run left it there
    loop = {"position": {"epoch": 0, "samples_in_epoch": 0}, "window": {"sum": 0, "num_losses": 0}}
    text = json.dumps(loop | {"total_loss": 0, "last_logged_step": 0, "run": run})
    (there / "loop_state.json").write_text(text)
    assert best_directory(state, str(tmp_path), run) == str(there)
    assert best_directory(state, str(tmp_path), None) == known
    state.best_model_checkpoint = os.path.join(tmp_path, ".", "checkpoint-2")
    assert best_directory(state, str(tmp_path), None) == str(there)
    shutil.copytree(there, tmp_path / "checkpoint-0")
    nothing = TrainerState(global_step=4)
    assert best_directory(nothing, str(tmp_path), run) is None  # no step was the best
    nothing.best_model_checkpoint = known
    assert best_directory(nothing, str(tmp_path), run) == known
