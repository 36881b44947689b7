"""What runs that died while saving left in a directory."""

import os
import shutil
import subprocess
import sys

from trainwright.checkpoint import leftovers
from trainwright.checkpoint.leftovers import clean_up_staging
from trainwright.checkpoint.manifest import problems, write_manifest


def make(output_dir, step):
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder, step, 1, {})


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


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
