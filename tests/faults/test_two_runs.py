"""Two live runs in one output directory are named; a dead one never stands in the way."""

import os
import signal
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from runs import make_run

from trainwright import TrainerCallback
from trainwright.checkpoint import layout
from trainwright.checkpoint.output_dir_lock import output_dir_lock
from trainwright.run import resume

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "win32", reason="forks, and locks a directory"
)
WARNING = "IS TRAINING INTO"


class Waits(TrainerCallback):
    """Says that training has begun, and waits for a byte."""

    def __init__(self, begun, go_on):
        self.begun, self.go_on = begun, go_on

    def on_train_begin(self, args, state, control, **kwargs):
        os.write(self.begun, b"x")
        os.read(self.go_on, 1)


def run_that_waits(out):
    """A forked run that has begun and waits: its process, and what to write to so that it goes on."""
    begun, go_on = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            make_run(out, trainer={"callbacks": [Waits(begun[1], go_on[0])]}, max_steps=1).train()
        finally:
            os._exit(0)
    os.read(begun[0], 1)
    return pid, go_on[1]


def test_a_second_live_run_in_the_same_directory_is_told_of_the_first(tmp_path, caplog):
    out = tmp_path / "out"
    pid, go_on = run_that_waits(out)
    make_run(out, max_steps=1).train()
    assert f"ANOTHER RUN (process {pid} on this machine) IS TRAINING INTO {out}" in caplog.text
    os.write(go_on, b"x")
    os.waitpid(pid, 0)
    caplog.clear()
    make_run(out, max_steps=1).train()
    assert WARNING not in caplog.text


def test_a_second_live_run_is_told_of_the_first_before_it_touches_what_lies_there(tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    make_run(out, max_steps=1, save_steps=1).train()
    pid, go_on = run_that_waits(out)
    told_before = {}

    def watched(module, name):
        function = getattr(module, name)

        def look(*args, **kwargs):
            told_before.setdefault(name, WARNING in caplog.text)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, look)

    watched(resume, "clean_up_staging")
    watched(resume, "find_resumable")  # sets damaged checkpoints aside
    watched(layout, "rotate_checkpoints")
    make_run(out, max_steps=2, save_steps=1, save_total_limit=1).train(resume_from_checkpoint="auto")
    os.write(go_on, b"x")
    os.waitpid(pid, 0)
    assert told_before == {"clean_up_staging": True, "find_resumable": True, "rotate_checkpoints": True}


def test_a_run_that_was_killed_leaves_nothing_in_the_way(tmp_path, caplog):
    out = tmp_path / "out"
    pid, _ = run_that_waits(out)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    trainer = make_run(out, max_steps=1, save_steps=1)
    trainer.train(resume_from_checkpoint="auto")
    assert WARNING not in caplog.text
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-1",
        "metrics.jsonl",
        "training_report.html",
    ]  # no lock file either


def test_loader_workers_that_outlive_training_do_not_keep_the_directory(tmp_path, caplog):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": 1}
    first = make_run(tmp_path / "out", **options)
    first.train()
    make_run(tmp_path / "out", max_steps=1).train()
    assert WARNING not in caplog.text


def test_where_nothing_can_be_locked_training_goes_on(tmp_path, monkeypatch, caplog):
    import fcntl

    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    make_run(tmp_path / "out", max_steps=1).train()
    with output_dir_lock(str(tmp_path / "absent")):
        pass
    assert WARNING not in caplog.text
