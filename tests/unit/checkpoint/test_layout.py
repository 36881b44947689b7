"""Which checkpoints there are, and which may go."""

import json
import os
import shutil
import time

import pytest

from trainwright.checkpoint import layout
from trainwright.checkpoint.layout import (
    checkpoint_name,
    checkpoints_to_delete,
    get_last_checkpoint,
    linked_checkpoints,
    rotate_checkpoints,
    same_place,
    sort_checkpoints,
    step_of,
)
from trainwright.checkpoint.manifest import problems, write_manifest


def make(output_dir, *steps):
    for step in steps:
        folder = output_dir / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        write_manifest(folder, step, 1, {})


def steps(paths):
    return [step_of(path) for path in paths]


def present(output_dir):
    return steps(sort_checkpoints(output_dir))


def test_checkpoints_are_ordered_by_step_not_by_spelling(tmp_path):
    make(tmp_path, 5, 10, 100, 15)
    assert present(tmp_path) == [5, 10, 15, 100]
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_modification_time_can_order_instead(tmp_path):
    make(tmp_path, 5, 10)
    os.utime(tmp_path / "checkpoint-5", (2e9, 2e9))
    assert steps(sort_checkpoints(tmp_path, use_mtime=True)) == [10, 5]


def test_other_names_files_and_staged_ones_are_no_checkpoints(tmp_path):
    make(tmp_path, 5)
    for name in (
        "checkpoint-abc",
        "checkpoint-7-old",
        "my-checkpoint-8",
        ".checkpoint-9.staged-1",
        "checkpoint-6.damaged",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / ".incomplete").write_text("")
    assert present(tmp_path) == [5]


def test_an_empty_folder_has_no_last_checkpoint_and_a_missing_one_is_an_error(tmp_path):
    assert get_last_checkpoint(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        get_last_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(
    ("best", "expected"),
    [(5, [10, 15, 5, 100]), (10, [5, 15, 10, 100]), (15, [5, 10, 15, 100]), (100, [5, 10, 15, 100])],
)
def test_the_best_checkpoint_moves_to_the_place_before_the_last(tmp_path, best, expected):
    make(tmp_path, 5, 10, 15, 100)
    assert steps(sort_checkpoints(tmp_path, best_model_checkpoint=str(tmp_path / f"checkpoint-{best}"))) == expected


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [5, 10, 15, 100]),
        (0, None, [5, 10, 15, 100]),
        (1, None, [100]),
        (1, 5, [5, 100]),
        (1, 100, [100]),
        (2, None, [15, 100]),
        (2, 5, [5, 100]),
        (3, 5, [5, 15, 100]),
        (9, 5, [5, 10, 15, 100]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, left):
    make(tmp_path, 5, 10, 15, 100)
    rotate_checkpoints(tmp_path, limit, str(tmp_path / f"checkpoint-{best}") if best else None)
    assert present(tmp_path) == left
    assert sorted(os.listdir(tmp_path)) == sorted(checkpoint_name(step) for step in left)  # nothing hidden stays


def test_rotation_neither_counts_nor_deletes_a_directory_that_is_not_ours(tmp_path):
    make(tmp_path, 10, 20)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    make(tmp_path / "elsewhere", 3)
    os.symlink(tmp_path / "elsewhere" / "checkpoint-3", tmp_path / "checkpoint-3")
    rotate_checkpoints(tmp_path, 2)
    assert present(tmp_path) == [1, 10, 20]
    rotate_checkpoints(tmp_path, 1)
    assert present(tmp_path) == [1, 20] and os.path.islink(tmp_path / "checkpoint-3")
    assert problems(tmp_path / "elsewhere" / "checkpoint-3") == []


def test_rotation_never_deletes_the_last_good_one(tmp_path, caplog):
    make(tmp_path, 10, 20, 30)
    (tmp_path / "checkpoint-30" / "model.safetensors").write_bytes(b"")
    rotate_checkpoints(tmp_path, 1)
    assert present(tmp_path) == [20, 30]
    assert "checkpoint-20 is kept beyond save_total_limit" in caplog.text


def test_what_must_be_kept_stays_on_top_of_the_limit(tmp_path):
    make(tmp_path, 10, 20, 30)
    assert steps(checkpoints_to_delete(tmp_path, 1, keep=[str(tmp_path / "checkpoint-10")])) == [20]


def make_named(output_dir, prefix, *steps):
    for step in steps:
        make(output_dir / "staging", step)
        os.rename(output_dir / "staging" / checkpoint_name(step), output_dir / f"{prefix}-{step}")
    os.rmdir(output_dir / "staging")


def names(paths):
    return [os.path.basename(path) for path in paths]


def set_age(path, seconds):
    os.utime(path, (2e9 - seconds, 2e9 - seconds))


def test_checkpoints_of_another_prefix_are_looked_for_by_it(tmp_path):
    make(tmp_path, 5)
    make_named(tmp_path, "a.b", 6, 7)
    (tmp_path / "aXb-8").mkdir()
    assert names(sort_checkpoints(tmp_path, "a.b")) == ["a.b-6", "a.b-7"]
    assert names(checkpoints_to_delete(tmp_path, 1, checkpoint_prefix="a.b")) == ["a.b-6"]
    rotate_checkpoints(tmp_path, 1, checkpoint_prefix="a.b")
    assert sorted(os.listdir(tmp_path)) == ["a.b-7", "aXb-8", "checkpoint-5"]


def test_checkpoints_of_one_moment_are_ordered_by_step(tmp_path):
    make(tmp_path, 100, 20, 3)
    for path in tmp_path.iterdir():
        set_age(path, 0)
    assert steps(sort_checkpoints(tmp_path, use_mtime=True)) == [3, 20, 100]


def test_links_are_listed_apart_by_step(tmp_path):
    make(tmp_path, 5)
    for name in ("checkpoint-10", "checkpoint-9", "latest"):
        (tmp_path / name).symlink_to(tmp_path / "checkpoint-5")
    assert names(linked_checkpoints(tmp_path)) == ["checkpoint-9", "checkpoint-10"]
    assert present(tmp_path) == [5]


def test_rotation_by_modification_time_deletes_the_oldest(tmp_path):
    make(tmp_path, 10, 20, 30)
    for step, age in ((10, 1), (20, 3), (30, 2)):
        set_age(tmp_path / checkpoint_name(step), age)
    assert steps(checkpoints_to_delete(tmp_path, 1, use_mtime=True)) == [20, 30]
    assert steps(checkpoints_to_delete(tmp_path, 1)) == [10, 20]
    rotate_checkpoints(tmp_path, 2, use_mtime=True)
    assert present(tmp_path) == [10, 30]


def test_the_checkpoint_just_written_stays_though_others_have_higher_numbers(tmp_path):
    make(tmp_path, 10, 20, 30)
    for step, age in ((10, 1), (20, 3), (30, 2)):
        set_age(tmp_path / checkpoint_name(step), age)
    rotate_checkpoints(tmp_path, 1)
    assert present(tmp_path) == [10, 30]


def test_the_best_one_is_known_by_where_it_leads(tmp_path):
    make(tmp_path, 10, 20, 30)
    (tmp_path / "link").symlink_to(tmp_path)
    best = str(tmp_path / "link" / "checkpoint-10")
    assert steps(checkpoints_to_delete(tmp_path, 1, best)) == [20]
    assert steps(checkpoints_to_delete(tmp_path, 1, keep=[best])) == [20]
    assert same_place(best, str(tmp_path / "checkpoint-10")) and not same_place(best, str(tmp_path))
    assert same_place(best, None) is False


def test_nothing_is_kept_beyond_the_limit_where_one_that_stays_is_whole(tmp_path, caplog):
    make(tmp_path, 10, 20, 30)
    (tmp_path / "checkpoint-30" / "model.safetensors").write_bytes(b"")
    rotate_checkpoints(tmp_path, 2)
    assert present(tmp_path) == [20, 30] and "is kept beyond" not in caplog.text


def test_nothing_is_kept_where_none_is_whole(tmp_path):
    make(tmp_path, 10, 20)
    for step in (10, 20):
        (tmp_path / checkpoint_name(step) / "model.safetensors").write_bytes(b"")
    rotate_checkpoints(tmp_path, 1)
    assert present(tmp_path) == [20]


def test_a_directory_of_anothers_is_not_the_whole_one_that_stays(tmp_path):
    make(tmp_path, 10, 20)
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint-30").mkdir()
    shutil.copy(tmp_path / "checkpoint-10" / "model.safetensors", tmp_path / "checkpoint-30")
    rotate_checkpoints(tmp_path, 1)
    assert present(tmp_path) == [10, 20, 30]


def test_the_best_of_two_stays_and_a_single_one_always_does(tmp_path):
    make(tmp_path, 10)
    assert checkpoints_to_delete(tmp_path, 1, str(tmp_path / "checkpoint-10")) == []
    make(tmp_path, 20)
    assert checkpoints_to_delete(tmp_path, 1, str(tmp_path / "checkpoint-10")) == []


def record_in(checkpoint, run, started_ns=1):
    """Write into `checkpoint` that a run wrote it; the record."""
    record = {"id": run, "started_ns": started_ns}
    loop = {"position": {"epoch": 0, "samples_in_epoch": 0}, "window": {"sum": 0, "num_losses": 0}}
    text = json.dumps(loop | {"total_loss": 0, "last_logged_step": 0, "run": record})
    (checkpoint / "loop_state.json").write_text(text)
    return record


def test_checkpoints_of_an_earlier_run_go_first_but_not_by_modification_time(tmp_path):
    for step, run, age in ((2, "new", 2), (9, "old", 1)):
        make(tmp_path, step)
        record_in(tmp_path / checkpoint_name(step), run, {"old": 1, "new": 2}[run])
        set_age(tmp_path / checkpoint_name(step), age)
    assert steps(checkpoints_to_delete(tmp_path, 1)) == [9]
    assert steps(checkpoints_to_delete(tmp_path, 1, use_mtime=True)) == [2]


def test_of_another_prefix_the_one_just_written_stays_and_one_that_is_whole_is_enough(tmp_path):
    make_named(tmp_path, "run", 6, 7, 8)
    for step, age in ((6, 1), (7, 3), (8, 2)):
        set_age(tmp_path / f"run-{step}", age)
    rotate_checkpoints(tmp_path, 1, checkpoint_prefix="run")
    assert sorted(os.listdir(tmp_path)) == ["run-6", "run-8"]


def test_rotation_compares_sizes_and_reads_no_weights(tmp_path, monkeypatch):
    depths = []
    whole = layout.problems
    monkeypatch.setattr(layout, "problems", lambda path, deep=True: depths.append(deep) or whole(path, deep=deep))
    make(tmp_path, 10, 20, 30)
    (tmp_path / "checkpoint-30" / "model.safetensors").write_bytes(b"")
    rotate_checkpoints(tmp_path, 1)
    assert present(tmp_path) == [20, 30] and set(depths) == {False}


def test_without_a_limit_nothing_is_to_be_deleted(tmp_path):
    make(tmp_path, 10, 20)
    assert [checkpoints_to_delete(tmp_path, limit) for limit in (None, 0, -1)] == [[], [], []]


def test_what_rotation_drops_is_handed_to_the_deleter(tmp_path):
    make(tmp_path, 10, 20)
    dropped = []
    rotate_checkpoints(tmp_path, 1, deleter=dropped.append)
    assert present(tmp_path) == [20] and os.listdir(dropped[0]) and len(dropped) == 1


# Which run wrote a checkpoint.

LATER_NS = time.time_ns() + 10**18  # a clock that was put back since


@pytest.fixture
def runs(tmp_path):
    """Steps 4 and 8 of an older run, 2 of a newer one; the paths by step, and both records."""
    make(tmp_path, 2, 4, 8)
    paths = {step: str(tmp_path / checkpoint_name(step)) for step in (2, 4, 8)}
    older, _ = (record_in(tmp_path / checkpoint_name(step), "older", LATER_NS) for step in (4, 8))
    return paths, older, record_in(tmp_path / checkpoint_name(2), "newer", LATER_NS + 1)


def test_the_checkpoints_of_the_newest_run_come_last(runs):
    paths, _, _ = runs
    assert steps(layout.oldest_first(paths.values())) == [4, 8, 2]
    assert steps(layout.of_earlier_runs(paths.values())) == [4, 8]
    assert layout.of_earlier_runs([]) == []


def test_a_run_continues_the_newest_checkpoint_and_is_a_later_one_otherwise(runs, tmp_path):
    paths, older, newer = runs
    ordered = list(paths.values())
    os.symlink(paths[2], tmp_path / "link")
    assert layout.continued(paths[2], ordered) == layout.continued(str(tmp_path / "link"), ordered) == newer
    anew = [layout.continued(checkpoint, ordered) for checkpoint in (None, paths[4], paths[8], str(tmp_path))]
    assert [record["started_ns"] for record in anew] == [newer["started_ns"] + 1] * 4
    assert len({record["id"] for record in anew} | {older["id"], newer["id"]}) == 6
    before_ns = time.time_ns()
    alone = [layout.continued(checkpoint, []) for checkpoint in (None, paths[2])]
    assert all(before_ns <= record["started_ns"] <= time.time_ns() for record in alone)


def test_a_checkpoint_without_a_record_is_continued_by_a_run_of_its_own(tmp_path):
    make(tmp_path, 3)
    path = str(tmp_path / "checkpoint-3")
    assert layout.continued(path, [path]).keys() == {"id", "started_ns"}


def test_what_a_run_wrote_is_told_by_its_record(runs):
    paths, older, newer = runs
    assert [layout.wrote(older, path) for path in paths.values()] == [False, True, True]
    assert [layout.wrote(newer, path) for path in paths.values()] == [True, False, False]
    assert not layout.wrote(None, paths[2]) and not layout.wrote(newer, paths[2] + "0")


@pytest.mark.parametrize(("newest_s", "expected"), [(100, [4, 8, 2]), (300, [2, 4, 8])])
def test_what_has_no_record_is_one_run_as_old_as_its_newest_file(tmp_path, newest_s, expected):
    make(tmp_path, 2, 4, 8)
    record_in(tmp_path / "checkpoint-2", "recorded", 200 * 10**9)
    for step, file_s in ((4, 50), (8, newest_s)):
        state = tmp_path / checkpoint_name(step) / "trainer_state.json"
        state.write_text("{}")
        os.utime(state, (file_s, file_s))  # of the directory: now
    assert steps(layout.oldest_first(sort_checkpoints(tmp_path))) == expected


def test_without_a_trainer_state_the_directory_says_how_old_it_is_and_one_of_others_is_the_oldest(tmp_path):
    make(tmp_path, 2, 4)
    (tmp_path / "checkpoint-3").mkdir()  # not ours
    record_in(tmp_path / "checkpoint-2", "recorded", 200 * 10**9)
    os.utime(tmp_path / "checkpoint-4", (300, 300))
    assert steps(layout.oldest_first(sort_checkpoints(tmp_path))) == [2, 3, 4]
    os.utime(tmp_path / "checkpoint-4", (100, 100))
    assert steps(layout.oldest_first(sort_checkpoints(tmp_path))) == [3, 4, 2]
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert steps(layout.oldest_first(sort_checkpoints(tmp_path))) == [3, 2]


@pytest.fixture
def read(monkeypatch):
    """The paths of the files whose record is read, from now on."""
    paths = []
    plain = layout.read_run_record
    monkeypatch.setattr(layout, "read_run_record", lambda path: paths.append(path) or plain(path))
    layout.note("nothing", None)
    return paths


def test_the_record_of_what_this_run_wrote_last_is_not_read(runs, read, tmp_path):
    paths, older, newer = runs
    layout.note(paths[2], newer)
    assert layout.record_of(os.path.relpath(paths[2])) == newer and read == []
    changed = record_in(tmp_path / "checkpoint-2", "another run with a longer name")
    assert layout.record_of(paths[2]) == changed and len(read) == 1
    layout.note(paths[2], changed)
    layout.note(paths[4], older)
    assert layout.record_of(paths[2]) == changed and len(read) == 2  # only the last is remembered
    layout.note(paths[4], None)
    assert layout.record_of(paths[4]) == older and len(read) == 3
    layout.note(str(tmp_path / "absent"), older)  # of a process that writes none
    assert layout.record_of(str(tmp_path / "absent")) is None


def test_records_that_were_put_in_order_are_not_read_again(runs, read, tmp_path):
    paths, _, _ = runs
    for _ in range(2):
        layout.oldest_first(paths.values())
        assert len(read) == 3
    record_in(tmp_path / "checkpoint-8", "another run with a longer name", LATER_NS + 2)
    assert steps(layout.oldest_first(paths.values())) == [4, 2, 8] and len(read) == 4
    layout.oldest_first([paths[2]])
    layout.oldest_first([paths[4]])
    assert len(read) == 5  # only those that were asked for together are remembered


def test_a_checkpoint_that_goes_while_records_are_read_has_the_one_that_was_read(runs, monkeypatch):
    paths, _, _ = runs
    plain = layout.read_run_record
    layout.note("nothing", None)
    layout.oldest_first([])
    monkeypatch.setattr(layout, "read_run_record", lambda path: (plain(path), os.remove(path))[0])
    assert steps(layout.oldest_first(paths.values())) == [4, 8, 2]
