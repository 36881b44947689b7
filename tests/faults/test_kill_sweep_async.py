"""Kill the writer of asynchronous saves, the run, or both, at every file-system call of a save; nothing is lost by it.

The writer is forked (as in runs.forked_writer), so that it can be told at which of its calls somebody dies. What the
run itself calls is swept as well: making the staging directory, files that an override writes, rotation.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from runs import FrozenLine, complete_steps, difference, end_of, forked_writer, make_run, resume_or_start, watch_files

from trainwright import Trainer
from trainwright.checkpoint import asynchronous, frozen, writer
from trainwright.checkpoint.layout import sort_checkpoints

OPTIONS = {"max_steps": 6, "save_steps": 2, "save_total_limit": 2, "async_save": True}
BEST = {
    **OPTIONS, "max_steps": 3, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
    "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True, "save_total_limit": 1,
}  # fmt: skip

FROZEN = {**OPTIONS, "max_steps": 3, "save_steps": 1, "model": FrozenLine}


@pytest.fixture(autouse=True)
def few_frozen_weights_are_worth_a_file(monkeypatch):
    monkeypatch.setattr(frozen, "LEAST_BYTES", 1)


class WithNotes(Trainer):
    """Writes files of its own, in the run."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        with open(os.path.join(output_dir, "notes.txt"), "w") as file:
            file.write("mine")


def hidden(out):
    return [name for name in os.listdir(out) if name.startswith(".")]


def counting(count, then=lambda number: None):
    """Count the file-system calls of the process this is called in, in `count[0]`; `then(number)` happens before."""

    def on_call(kind, path, tear):
        count[0] += 1
        then(count[0])

    return lambda: watch_files(on_call)


def dying_at(point):
    """Ends the process before its call `point`."""
    return lambda number: os._exit(7) if number == point else None


def in_child(action):
    """Run `action` in a forked child; its exit code, negative after a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            action()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def num_calls_of_writer(monkeypatch, out, options):
    """File-system calls that the writer of an undisturbed run makes, and how many of them before its last save."""
    read, write = os.pipe()
    count, commits = [0], []
    commit = writer.commit

    def prepare():
        counting(count)()

        def counted(*args, **kwargs):
            result = commit(*args, **kwargs)
            commits.append(count[0])
            os.write(write, bytes([commits[-1]]))
            return result

        writer.commit = counted

    with monkeypatch.context() as patch:
        patch.setattr(writer, "launch", forked_writer(prepare))
        make_run(out, **options).train()
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        commits = list(pipe.read())
    shutil.rmtree(out)
    assert len(commits) == options["max_steps"] // options["save_steps"]
    return commits[-1], commits[-2]


@pytest.mark.parametrize("options", [OPTIONS, BEST, FROZEN], ids=["rotating", "best", "frozen"])
def test_a_writer_that_dies_at_any_of_its_calls_costs_nothing(tmp_path, monkeypatch, caplog, options):
    out = tmp_path / "out"
    monkeypatch.setattr(writer, "launch", forked_writer())
    whole = make_run(out, **options)
    whole.train()
    logged = ["metrics.jsonl", "training_report.html"]
    expected, left = end_of(whole), [name for name in sorted(os.listdir(out)) if name not in logged]
    shutil.rmtree(out)
    num_calls, first = num_calls_of_writer(monkeypatch, out, options)
    assert num_calls - first > 30
    for point in range(first + 1, num_calls + 1, 1 if options is OPTIONS else 3 if options is FROZEN else 2):
        caplog.clear()
        monkeypatch.setattr(writer, "launch", forked_writer(counting([0], dying_at(point))))
        run = make_run(out, **options)
        run.train()
        where = f"writer died at call {point}"
        assert caplog.text.count("ended with exit code 7") == 1, where
        assert difference(expected, end_of(run)) == "", where
        assert sorted(os.listdir(out)) == [*left, *logged] and len(complete_steps(out)) == len(left), where
        again = make_run(out, **options)
        again.train(resume_from_checkpoint=True)
        assert difference(expected, end_of(again), but=("random",)) == "", where
        shutil.rmtree(out)


@pytest.mark.parametrize("both", [True, False], ids=["with its writer", "and its writer finishes"])
def test_a_run_killed_at_any_call_of_its_writer_resumes_and_ends_the_same(tmp_path, monkeypatch, both):
    out, options = tmp_path / "out", OPTIONS
    monkeypatch.setattr(writer, "launch", forked_writer())
    whole = make_run(out, **options)
    whole.train()
    expected = end_of(whole)
    shutil.rmtree(out)
    num_calls, first = num_calls_of_writer(monkeypatch, out, options)
    step_of_save, num_dead = options["max_steps"], 0
    for point in range(first + 1, num_calls + 1, 1 if both else 3):
        read, write = os.pipe()

        def die(number, point=point, write=write):
            if number == point:
                os.write(write, b"x")
                os.kill(os.getppid(), signal.SIGKILL)
                if both:
                    os._exit(0)

        with monkeypatch.context() as patch:
            patch.setattr(writer, "launch", forked_writer(counting([0], die)))
            code = in_child(lambda: make_run(out, **options).train())
        os.close(write)
        with os.fdopen(read, "rb") as pipe:  # closed by the last process that holds it: the writer has ended
            assert pipe.read() == b"x"
        where = f"killed at call {point} of the writer"
        assert code == -signal.SIGKILL, where
        num_dead += 1
        complete = max(complete_steps(out))
        assert complete >= step_of_save - options["save_steps"], where
        assert both or complete == step_of_save, where
        again = make_run(out, **options)
        assert resume_or_start(again), where
        finished = complete == step_of_save
        assert difference(expected, end_of(again), but=("random",) if finished else ()) == "", where
        assert hidden(out) == [], where
        shutil.rmtree(out)
    assert num_dead > (30 if both else 10)


def test_a_run_that_dies_at_any_of_its_own_calls_resumes_and_ends_the_same(tmp_path, monkeypatch):
    """Its own calls: the staging directory, what an override writes, and taking its name from what rotation drops. The
    writer, if it has a job, ends it; deleting is a call of the writer's.
    """
    out, options = tmp_path / "out", OPTIONS | {"max_steps": 4, "save_total_limit": 1}
    make = lambda: make_run(out, cls=WithNotes, **options)  # noqa: E731
    monkeypatch.setattr(writer, "launch", forked_writer())
    whole = make()
    whole.train()
    expected = end_of(whole)
    shutil.rmtree(out)
    point, num_died = 0, 0
    while True:
        point += 1
        read, write = os.pipe()

        def action(point=point):
            run, count = os.getpid(), [0]

            def die(number):
                if os.getpid() == run and number == point:
                    os._exit(9)

            counting(count, die)()
            writer.launch = forked_writer()
            make().train()

        code = in_child(action)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            pipe.read()  # until the writer has ended
        if code == 0:
            break
        assert code == 9
        num_died += 1
        where = f"died at call {point}"
        again = make()
        resume_or_start(again)
        assert difference(expected, end_of(again), but=("random",)) == "", where
        assert hidden(out) == [], where
        notes = [Path(checkpoint, "notes.txt").read_text() for checkpoint in sort_checkpoints(out)]
        assert notes and set(notes) == {"mine"}, where
        shutil.rmtree(out)
    assert num_died > 15


def test_a_run_that_dies_while_it_copies_leaves_nothing_that_is_taken_for_a_checkpoint(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(writer, "launch", forked_writer())

    def action():
        begin = asynchronous.AsyncSaves.begin

        def die(self, gather):
            if self.num_saves == 1:
                os._exit(9)
            begin(self, gather)

        asynchronous.AsyncSaves.begin = die
        make_run(out, **OPTIONS).train()

    assert in_child(action) == 9
    assert complete_steps(out) == [2] and len(hidden(out)) == 1
    deadline = time.monotonic() + 60
    pid = int(hidden(out)[0].rpartition("-")[2])
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:  # it ends by itself: nobody speaks to it
        time.sleep(0.01)
    again = make_run(out, **OPTIONS)
    again.train(resume_from_checkpoint=True)
    assert again._run.first_step == 2 and hidden(out) == []
