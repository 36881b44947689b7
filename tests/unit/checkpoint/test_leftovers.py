"""What runs that died while saving left in a directory."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from trainwright.checkpoint import leftovers
from trainwright.checkpoint.layout import checkpoint_name
from trainwright.checkpoint.leftovers import clean_up_staging
from trainwright.checkpoint.manifest import problems, write_manifest


def make(output_dir, step):
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder, step, 1, {})


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class Sorted:
    """What `os.scandir` finds, by name."""

    def __init__(self, entries):
        self.entries = iter(sorted(entries, key=lambda entry: entry.name))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.entries)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def close(self):
        pass


@pytest.fixture
def by_name(monkeypatch):
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": Sorted(scan(path)))


def test_cleaning_up_deletes_what_dead_runs_staged_and_leaves_live_ones(tmp_path):
    make(tmp_path, 10)
    dead, alive = dead_pid(), os.getppid()
    for name in (f".checkpoint-20.staged-{dead}", f".checkpoint-5.deleted-{dead}", f".checkpoint-20.staged-{alive}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").write_bytes(b"half")
    clean_up_staging(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f".checkpoint-20.staged-{alive}", "checkpoint-10"]


def test_cleaning_up_names_a_checkpoint_that_was_complete_when_its_run_died(tmp_path):
    make(tmp_path, 20)
    os.rename(tmp_path / "checkpoint-20", tmp_path / f".checkpoint-20.staged-{dead_pid()}")
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-20"]
    assert problems(tmp_path / "checkpoint-20") == []


def test_cleaning_up_brings_back_what_was_moved_aside(tmp_path):
    make(tmp_path, 20)
    dead = dead_pid()
    os.rename(tmp_path / "checkpoint-20", tmp_path / f".checkpoint-20.replaced-{dead}")
    (tmp_path / f".checkpoint-20.staged-{dead}").mkdir()
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-20"]
    assert problems(tmp_path / "checkpoint-20") == []


def test_a_process_that_began_after_a_left_over_only_has_its_number(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left = tmp_path / f".checkpoint-20.staged-{process.pid}"
    left.mkdir()
    clean_up_staging(tmp_path)
    assert left.is_dir()  # it runs, and can have made it
    os.utime(left, (1e9, 1e9))  # in 2001
    clean_up_staging(tmp_path)
    assert not left.exists()
    process.communicate(b"\n")


def test_a_process_that_has_ended_and_was_not_waited_for_is_not_running(tmp_path):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    (tmp_path / f".checkpoint-20.staged-{pid}").mkdir()
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == []
    os.waitpid(pid, 0)


WRITES = """
import os, sys
folder, name = sys.argv[1], "trainwright.checkpoint.writer"
print("ready", flush=True)
sys.stdin.readline()
os.rename(os.path.join(folder, f".checkpoint-20.staged-{os.getpid()}"), os.path.join(folder, "checkpoint-20"))
"""


def start_writer(folder):
    command = [sys.executable, "-c", WRITES, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def test_cleaning_up_waits_for_the_writer_that_outlives_its_run(tmp_path, monkeypatch):
    writer = start_writer(tmp_path)
    make(tmp_path, 20)
    os.rename(tmp_path / "checkpoint-20", tmp_path / f".checkpoint-20.staged-{writer.pid}")
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:  # only now it continues
            writer.communicate(b"\n")

    monkeypatch.setattr(leftovers.time, "sleep", pause)
    clean_up_staging(tmp_path)
    assert len(pauses) == 3 and os.listdir(tmp_path) == ["checkpoint-20"]
    assert all(0 < seconds < 0.5 for seconds in pauses)  # neither busily nor long after it is done


def test_a_writer_that_does_not_end_is_left_alone(tmp_path, monkeypatch, caplog):
    writer = start_writer(tmp_path)
    (tmp_path / f".checkpoint-20.staged-{writer.pid}").mkdir()
    monkeypatch.setattr(leftovers, "MOST_WAIT_S", 0)
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == [f".checkpoint-20.staged-{writer.pid}"]
    assert "is not done after 0 s and left alone" in caplog.text
    writer.kill()
    writer.communicate()


def test_cleaning_up_replaces_a_broken_checkpoint_by_the_complete_one_that_was_staged_for_it(tmp_path):
    make(tmp_path, 20)
    shutil.copytree(tmp_path / "checkpoint-20", tmp_path / f".checkpoint-20.staged-{dead_pid()}")
    (tmp_path / "checkpoint-20" / "model.safetensors").unlink()
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-20"]
    assert problems(tmp_path / "checkpoint-20") == []


def staged(output_dir, step, purpose="staged", pid=None):
    """A whole checkpoint under the name that a run gives it before or after it has its own."""
    make(output_dir / "staging", step)
    name = f".checkpoint-{step}.{purpose}-{dead_pid() if pid is None else pid}"
    os.rename(output_dir / "staging" / checkpoint_name(step), output_dir / name)
    os.rmdir(output_dir / "staging")
    return output_dir / name


def test_a_staged_checkpoint_never_replaces_one_that_is_whole(tmp_path):
    make(tmp_path, 20)
    (tmp_path / "checkpoint-20" / "note.txt").write_text("the first")
    staged(tmp_path, 20)
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-20"] and (tmp_path / "checkpoint-20" / "note.txt").exists()


def test_a_damaged_staged_checkpoint_is_deleted(tmp_path):
    (staged(tmp_path, 20) / "model.safetensors").write_bytes(b"WEIGHTS")  # of the same size
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_staged_checkpoint_without_a_manifest_is_not_whole(tmp_path):
    folder = staged(tmp_path, 20)
    (folder / "manifest.json").unlink()
    (folder / "trainer_state.json").write_text("{}")
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_was_moved_aside_goes_where_its_place_is_taken_again(tmp_path):
    make(tmp_path, 20)
    (tmp_path / "checkpoint-20" / "note.txt").write_text("the new one")
    staged(tmp_path, 20, "replaced")
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-20"] and (tmp_path / "checkpoint-20" / "note.txt").exists()


def test_of_a_new_checkpoint_and_the_one_it_was_to_replace_the_new_one_stays(tmp_path, by_name):
    (staged(tmp_path, 20) / "note.txt").write_text("the new one")
    staged(tmp_path, 20, "replaced")
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-20"] and (tmp_path / "checkpoint-20" / "note.txt").exists()


def test_a_model_that_was_staged_is_deleted_whole_or_not(tmp_path):
    make(tmp_path, 20)
    os.rename(tmp_path / "checkpoint-20", tmp_path / f".model.staged-{dead_pid()}")
    (tmp_path / f"..checkpoint-20.replaced-7.deleted-{dead_pid()}").mkdir()
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_was_copied_halfway_into_its_place_is_deleted_or_replaced(tmp_path):
    for step in (10, 20):
        make(tmp_path, step)
        (tmp_path / checkpoint_name(step) / ".incomplete").write_text("")
    staged(tmp_path, 20)
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-20"] and problems(tmp_path / "checkpoint-20") == []


@pytest.mark.parametrize("pid", [0, "own", 1 << 31, 10**18])
def test_what_no_other_process_can_have_made_is_deleted(tmp_path, pid):
    (tmp_path / f".checkpoint-20.staged-{os.getpid() if pid == 'own' else pid}").mkdir()
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_process_of_someone_else_runs(tmp_path, monkeypatch):
    def forbidden(pid, signal):
        raise PermissionError

    monkeypatch.setattr(leftovers.os, "kill", forbidden)
    (tmp_path / f".checkpoint-20.staged-{os.getppid()}").mkdir()
    clean_up_staging(tmp_path)
    assert len(os.listdir(tmp_path)) == 1


def test_names_of_others_and_files_and_links_are_left_alone(tmp_path):
    dead = dead_pid()
    (tmp_path / "elsewhere").mkdir()
    kept = [f".checkpoint-5.staged-{dead}", f".checkpoint-6.deleted-{dead}"]
    (tmp_path / kept[0]).write_text("a file")
    (tmp_path / kept[1]).symlink_to(tmp_path / "elsewhere")
    kept += [f".checkpoint-7.moved-{dead}", ".checkpoint-8.staged-", f"x.checkpoint-9.staged-{dead}", "notes"]
    for name in kept[2:]:
        (tmp_path / name).mkdir()
    (tmp_path / "notes" / ".incomplete").write_text("")
    (tmp_path / "checkpoint-9").write_text("a file")
    clean_up_staging(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "elsewhere", "checkpoint-9"])


def test_only_what_a_writer_stages_is_waited_for(tmp_path, monkeypatch):
    def pause(seconds):
        raise AssertionError("waits")

    monkeypatch.setattr(leftovers.time, "sleep", pause)
    writer = start_writer(tmp_path)
    replaced = tmp_path / f".checkpoint-20.replaced-{writer.pid}"
    replaced.mkdir()
    (tmp_path / f".checkpoint-30.staged-{os.getppid()}").mkdir()  # of a process that writes none
    clean_up_staging(tmp_path)
    assert replaced.is_dir() and len(os.listdir(tmp_path)) == 2
    writer.kill()
    writer.communicate()


def test_nothing_that_others_put_between_hides_what_a_dead_run_left(tmp_path, by_name):
    dead = dead_pid()
    for name in (".aaa", f".checkpoint-1.staged-{dead}", ".checkpoint-2.x", f".checkpoint-3.deleted-{dead}", "a", "z"):
        (tmp_path / name).mkdir()
    for step in (10, 20, 30):
        make(tmp_path, step)
        (tmp_path / checkpoint_name(step) / ".incomplete").write_text("")
    staged(tmp_path, 20, pid=dead)
    clean_up_staging(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".aaa", ".checkpoint-2.x", "a", "checkpoint-20", "z"]


def test_a_link_in_place_of_what_was_staged_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    make(tmp_path / "elsewhere", 5)
    link = tmp_path / f".checkpoint-5.staged-{dead_pid()}"
    link.symlink_to(tmp_path / "elsewhere" / "checkpoint-5")
    clean_up_staging(tmp_path)
    assert link.is_symlink() and sorted(os.listdir(tmp_path)) == sorted([link.name, "elsewhere"])


def test_what_cannot_be_deleted_keeps_no_run_from_starting(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError

    (tmp_path / f".checkpoint-5.staged-{dead_pid()}").mkdir()
    monkeypatch.setattr(os, "rmdir", refused)
    clean_up_staging(tmp_path)
    assert len(os.listdir(tmp_path)) == 1


def test_only_a_manifest_makes_a_staged_checkpoint_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers, "problems", lambda path: [])
    (staged(tmp_path, 20) / "manifest.json").unlink()
    staged(tmp_path, 30)
    clean_up_staging(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-30"]


def test_the_first_process_of_a_machine_is_one(tmp_path):
    left = tmp_path / ".checkpoint-20.staged-1"
    left.mkdir()
    clean_up_staging(tmp_path)
    assert left.is_dir()


def test_a_process_younger_than_a_left_over_did_not_make_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left = tmp_path / f".checkpoint-20.staged-{process.pid}"
    left.mkdir()
    os.utime(left, (time.time() - 100, time.time() - 100))
    clean_up_staging(tmp_path)
    assert not left.exists()
    process.communicate(b"\n")


def test_a_process_of_windows_is_not_asked_and_counts_as_running(tmp_path, monkeypatch):
    def asked(pid, signal):
        raise AssertionError("signal 0 is Ctrl-C there")

    left = tmp_path / f".checkpoint-20.staged-{dead_pid()}"
    left.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(leftovers.os, "name", "nt")
        patch.setattr(leftovers.os, "kill", asked)
        clean_up_staging(str(tmp_path))
    assert left.is_dir()


def test_a_process_may_be_called_anything(tmp_path):
    code = "open('/proc/self/comm', 'w').write('a) Z 1 4'); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    left = tmp_path / f".checkpoint-20.staged-{process.pid}"
    left.mkdir()
    clean_up_staging(tmp_path)
    assert left.is_dir()
    process.communicate(b"\n")


def test_a_writer_is_waited_for_until_it_has_named_its_checkpoint_and_no_longer(tmp_path, monkeypatch, by_name):
    for name in (".aaa", ".checkpoint-20.staged-1", ".checkpoint-30.replaced-1"):
        (tmp_path / name).mkdir()
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        assert len(pauses) <= 3
        if len(pauses) == 3:
            (tmp_path / ".checkpoint-20.staged-1").rmdir()

    monkeypatch.setattr(leftovers, "_is_writer", lambda pid: True)  # it lives on
    monkeypatch.setattr(leftovers.time, "sleep", pause)
    clean_up_staging(tmp_path)
    assert len(pauses) == 3


def test_each_writer_that_does_not_end_is_waited_for(tmp_path, monkeypatch, caplog):
    for step in (20, 30):
        (tmp_path / f".checkpoint-{step}.staged-1").mkdir()
    monkeypatch.setattr(leftovers, "_is_writer", lambda pid: True)
    monkeypatch.setattr(leftovers, "MOST_WAIT_S", -1)
    clean_up_staging(tmp_path)
    assert caplog.text.count("is not done") == 2
