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
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from runs import LineData, LineModel, difference, end_of, forked_writer, resume_or_start
from test_exact_data import (
    HeldGeneratorsCollator,
    Noisy,
    NoisyCollator,
    NoisySentences,
    Notes,
    OwnGeneratorCollator,
    SentenceModel,
    Shuffled,
)

from trainwright import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from trainwright.checkpoint import writer
from trainwright.state import ExportableState

NUM_CHEAP = 20  # draws of a plain call
PATIENCE_S = 120  # after which a configuration counts as hanging
COLLATORS = {"noisy": NoisyCollator, "late generator": OwnGeneratorCollator, "held": HeldGeneratorsCollator}


class Sharing(Shuffled):
    """A stream with a shuffle buffer that workers share by turns."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        buffer = []
        for index in range(first, self.length, every):
            buffer.append(index)
            if len(buffer) == self.buffer_size:
                yield self.sample(buffer.pop(random.randrange(self.buffer_size)))
        while buffer:
            yield self.sample(buffer.pop(random.randrange(len(buffer))))


class SizedSharing(Sharing):
    """Says its length, so that its epochs are known."""

    def __len__(self):
        return self.length


class Line(LineModel):
    main_input_name = "x"  # what is counted as tokens


class Sentences(SentenceModel):
    """Takes unpacked samples too, as an evaluation collates them."""

    def forward(self, input_ids, labels, seq_idx=None, attention_mask=None):
        return super().forward(input_ids, labels, torch.zeros_like(input_ids) if seq_idx is None else seq_idx)


class SilentEvaluation(Trainer):
    """Evaluates without the noise of the collator: an evaluation that a signal ends draws its numbers twice."""

    def get_eval_dataloader(self, eval_dataset=None):
        noisy, self.data_collator = self.data_collator, Notes()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = noisy


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


class Stopped(Exception):
    """What a script's mistake looks like."""


class Stop(TrainerCallback):
    """Ends the run after a step in one of three ways."""

    def __init__(self, step, way):
        self.step, self.way = step, way

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if self.way == "asked":
            control.should_save = control.should_training_stop = True
        elif self.way == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise Stopped


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


def draw(seed):
    """A configuration: plain values, so that a failure can print it."""
    r = random.Random(seed)
    data = r.choice(["map", "map", "map", "stream", "sized stream", "packed"])
    workers = r.choice([0, 0, 0, 1, 2])
    options = {
        "per_device_train_batch_size": r.randint(1, 5),
        "gradient_accumulation_steps": r.choice([1, 1, 2, 3, 5]),
        "dataloader_drop_last": r.random() < 0.4,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0 and r.random() < 0.7,
        "per_device_eval_batch_size": 3,
        "optim": r.choice(["adamw_torch", "sgd", "adafactor"]),
        "lr_scheduler_type": r.choice(["linear", "cosine", "constant_with_warmup"]),
        "warmup_steps": r.choice([0, 2]),
        "max_grad_norm": r.choice([0.0, 1.0]),
        "bf16": r.random() < 0.25,
        "ema_decay": r.choice([None, None, 0.75]),
        "logging_steps": r.choice([1, 2, 3, 1000]),
        "logging_first_step": r.random() < 0.3,
        "include_num_input_tokens_seen": r.choice(["no", "no", "all"]),
        "save_steps": r.choice([1, 2, 3]),
        "save_total_limit": r.choice([None, 1, 2]),
        "async_save": r.random() < 0.3,
    }
    if data != "stream" and r.random() < 0.5:
        options["num_train_epochs"] = r.choice([1, 2, 3, 1.5, 2.3])
    else:
        options["max_steps"] = r.randint(2, 14)
    if data == "map":
        options["train_sampling_strategy"] = r.choice(["random", "sequential", "group_by_length", "batch_rebalance"])
    elif data == "packed":
        options |= {"packing": True, "packing_length": 16}
    evaluation = r.choice(["no", "no", "steps", "epoch", "best"])
    if evaluation == "steps":
        options |= {"eval_strategy": "steps", "eval_steps": r.choice([1, 2, 3])}
    elif evaluation == "epoch":
        options |= {"eval_strategy": "epoch", "logging_strategy": r.choice(["steps", "epoch"])}
    elif evaluation == "best":
        every = options["save_steps"]
        options |= {"eval_strategy": "steps", "eval_steps": every, "load_best_model_at_end": True}
    changed = {}
    if r.random() < 0.25:
        changed = {"per_device_train_batch_size": r.randint(1, 5), "gradient_accumulation_steps": r.choice([1, 2, 3])}
    return {
        "data": data,
        "length": r.randint(15, 40),
        "collator": None if data == "packed" else r.choice(list(COLLATORS)),
        "options": options,
        "changed": changed,  # after a first stop that both runs have in common
        "places": [r.random() for _ in range(r.choice([1, 1, 2]))],  # what they mean: `step_of`
        "ways": [r.choice(["asked", "signal", "exception"]) for _ in range(2)],
        "fork": r.random() < 0.3,
    }


def trainer_of(configuration, out, callbacks, options):
    data, length = configuration["data"], configuration["length"]
    kinds = {"map": Noisy, "stream": Sharing, "sized stream": SizedSharing, "packed": NoisySentences}
    collator = configuration["collator"]
    # Evaluation data that draw random numbers are not in the promise: a stream would see others when it is read again.
    held_out = [{"input_ids": list(range(row, row + 6))} for row in range(7)] if data == "packed" else LineData(7)
    trainer = (Trainer if data == "packed" else SilentEvaluation)(
        Sentences() if data == "packed" else Line(dropout=0.2),
        TrainingArguments(
            str(out), report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.05, save_strategy="steps",
            logging_dir="logs", **options,
        ),
        train_dataset=kinds[data](2 * length if data == "packed" else length),
        eval_dataset=held_out if "eval_strategy" in options else None,
        data_collator=collator and COLLATORS[collator](),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def live(configuration, out, options, stop=None, way=None):
    """One life of the run, from its newest checkpoint if there is one; how it ended, None where it was stopped."""
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


def step_of(place, at, steps, ends_of_epochs):
    """The step of a stop after `at`: for two places in five an epoch's end, for the others a share of the run."""
    ends = [end for end in ends_of_epochs if at < end <= steps]
    if place < 0.4 and ends:
        return ends[int(place / 0.4 * len(ends))]
    return min(at + 1 + int(place * (steps - at)), steps)


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
    raise AssertionError(f"the configuration did not end in {PATIENCE_S} s")


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
    signal.alarm(PATIENCE_S)
    try:
        hold(configuration, tmp_path)
    except BaseException as error:
        command = f"TRAINWRIGHT_DRAWS=1 TRAINWRIGHT_FIRST_DRAW={seed} pytest tests/faults/test_any_configuration.py"
        raise AssertionError(f"{error}\nseed {seed}: {json.dumps(configuration)}\nagain: {command}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
