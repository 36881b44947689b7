"""Any configuration: a run that is stopped and resumed is the undisturbed one, and leaves nothing running.

    make draws                                                  # 200 configurations, others on each day
    TRAINWRIGHT_DRAWS=1 TRAINWRIGHT_FIRST_DRAW=17 pytest tests/faults/test_any_configuration.py     # number 17 again

Each draw combines what the other tests of this directory hold for themselves: kinds of data, orders, workers, packs,
accumulation, precision, averages, evaluations, callbacks, saves, another batch size after a stop, ways of stopping, a
forked process that outlives the run.
"""

import contextlib
import gc
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from runs import difference, end_of, forked_writer, resume_or_start

from configurations import Stop, Stopped, draw, step_of, trainer_of
from trainwright import TrainerCallback
from trainwright.checkpoint import writer
from trainwright.state import ExportableState

NUM_CHEAP = 20  # draws of a plain call
PATIENCE_S = 120  # after which one life of a configuration counts as hanging


class Tally(TrainerCallback, ExportableState):
    """Counts what it sees and takes its counts to the next life."""

    def __init__(self, steps=0, lines=0, evaluations=0):
        self.steps, self.lines, self.evaluations = steps, lines, evaluations
        self.ends_of_epochs = []  # the steps after which one ended, in this life

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends_of_epochs.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines += "train_runtime" not in logs

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1

    def state(self):
        return {"args": {}, "attributes": {name: getattr(self, name) for name in ("steps", "lines", "evaluations")}}


class Fork(TrainerCallback):
    """Forks a process at the first step of a life, which outlives it, as a pool that a callback never closes does."""

    pid = None

    def on_step_end(self, args, state, control, **kwargs):
        if self.pid is None:
            self.pid = os.fork()
            if self.pid == 0:
                time.sleep(2 * PATIENCE_S)
                os._exit(0)

    def end(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def live(configuration, out, options, stop=None, way=None):
    """One life of the run, from its newest checkpoint if there is one; how it ended, None where it was stopped."""
    signal.alarm(PATIENCE_S)  # of each life: all of them together may take longer on a busy machine
    tally, fork = Tally(), Fork()
    threads, handlers = set(threading.enumerate()), [signal.getsignal(number) for number in (2, 10, 15)]
    callbacks = [tally, *([fork] if configuration["fork"] else []), *([Stop(stop, way)] if stop else [])]
    try:
        trainer = trainer_of(configuration, out, callbacks, options)
        with contextlib.suppress(Stopped, SystemExit):
            resume_or_start(trainer)
        state, end = trainer.state, None
        if stop is None:
            last = {name: state.log_history[-1].get(name) for name in ("train_loss", "epoch", "total_flos", "step")}
            length = (state.max_steps, state.num_train_epochs, state.num_input_tokens_seen)
            end = end_of(trainer) | {"last line": last, "length": length, "tally": tally.state()}
            end["ends of epochs"] = tally.ends_of_epochs
        del trainer, state
        assert_nothing_is_left(threads, handlers, {fork.pid}, out)
        return end
    finally:
        fork.end()


def assert_nothing_is_left(threads, handlers, forked, out):
    """No process, thread, signal handler, shared memory or half a checkpoint of the run that ended."""
    gc.collect()
    deadline = time.monotonic() + 10
    while True:
        processes = [
            child for child in psutil.Process().children()
            if child.pid not in forked and child.status() != psutil.STATUS_ZOMBIE and not is_python_tracker(child)
        ]  # fmt: skip
        new = [thread for thread in threading.enumerate() if thread not in threads and thread.name != "tqdm_monitor"]
        left = [*processes, *new, *memory_files()]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert left == []
    assert [signal.getsignal(number) for number in (2, 10, 15)] == handlers
    assert [entry.name for entry in os.scandir(out) if entry.name.startswith(".checkpoint")] == []


def is_python_tracker(process):
    """Python's process for shared memory, which lives as long as the interpreter."""
    with contextlib.suppress(psutil.Error):
        return any("resource_tracker" in word for word in process.cmdline())
    return True  # gone meanwhile


def memory_files():
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{entry}")
            found += [name] if "memfd:" in name else []
    return found


def hold(configuration, folder):
    """The whole run against the run that is stopped and resumed."""
    options, changed = configuration["options"], configuration["changed"]
    whole, stopped, at = folder / "whole", folder / "stopped", 0
    whole.mkdir()
    if changed:
        at = 2
        live(configuration, whole, options, at, "asked")
        options = options | changed
    shutil.copytree(whole, stopped)
    expected = live(configuration, whole, options)
    steps = expected["step"][0]
    assert steps == options.get("max_steps", expected["length"][0])
    stops = sorted({step_of(place, at, steps, expected["ends of epochs"]) for place in configuration["places"]})
    for stop, way in zip(stops, configuration["ways"], strict=False):
        if stop > at:
            live(configuration, stopped, options, stop, way)
    found = live(configuration, stopped, options)
    assert difference(expected, found, but=("ends of epochs",)) == "", f"after stops at {stops} of {steps} steps"


def is_late(*_):
    raise AssertionError(f"a life of the configuration did not end in {PATIENCE_S} s")


def seeds():
    """Those that the environment asks for, else the first whose evaluations start no workers, which costs most."""
    if "TRAINWRIGHT_DRAWS" in os.environ:
        first = int(os.environ.get("TRAINWRIGHT_FIRST_DRAW", "0"))
        return range(first, first + int(os.environ["TRAINWRIGHT_DRAWS"]))
    options = ((seed, draw(seed)["options"]) for seed in itertools.count())
    cheap = (seed for seed, given in options if not (given["dataloader_num_workers"] and "eval_strategy" in given))
    return list(itertools.islice(cheap, NUM_CHEAP))


@pytest.mark.parametrize("seed", seeds())
def test_a_run_that_is_stopped_and_resumed_is_the_undisturbed_one(tmp_path, monkeypatch, seed):
    configuration = draw(seed)
    monkeypatch.setattr(writer, "launch", forked_writer())  # the real one takes seconds to import torch
    before = signal.signal(signal.SIGALRM, is_late)
    try:
        hold(configuration, tmp_path)
    except BaseException as error:
        command = f"TRAINWRIGHT_DRAWS=1 TRAINWRIGHT_FIRST_DRAW={seed} pytest tests/faults/test_any_configuration.py"
        raise AssertionError(f"{error}\nseed {seed}: {json.dumps(configuration)}\nagain: {command}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
