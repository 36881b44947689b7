"""Kill one of two processes at every file-system call of a save: both resume, and end where nobody was killed.

Each point is two forked children that really train together (gloo, a file for a store). One dies by SIGKILL; the other
is killed with it, as torchrun does, or left alone. Then two more children resume and compare their end with the
undisturbed run's, each its own. By default every call of one case and a sample of the others is a point; all of them
with TRAINWRIGHT_FULL_SWEEP=1.
"""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import sys
import time

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from pairs import Pair
from runs import (
    PackedLanguage,
    complete_steps,
    difference,
    end_of,
    forked_writer,
    make_run,
    resume_or_start,
    token_rows,
    watch_files,
)

from trainwright.checkpoint import writer
from trainwright.checkpoint.manifest import problems

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # the first evaluation is the best, so rotation has to go round it
}
PARTS = {"state_dict_type": "sharded_state_dict"}
EVERY = os.environ.get("TRAINWRIGHT_FULL_SWEEP") == "1"
NEEDS = {"per_device_train_batch_size": 2, "ddp_timeout": 30}

# Options, the step from whose save on calls are points, and of how many calls of process 0 one is a point.
CASES = {
    "rotating": ({"max_steps": 3, "save_steps": 1, "save_total_limit": 2}, 3, 1),
    "fresh": ({"max_steps": 2, "save_steps": 1}, 1, 8),
    "best": ({"max_steps": 3, "save_steps": 1, **BEST}, 3, 6),
    # Each process writes its part of weights and optimizer.
    "parts": ({"max_steps": 2, "save_steps": 1, "fsdp": "full_shard", "fsdp_config": PARTS}, 2, 8),
    "weights only": ({"max_steps": 2, "save_steps": 1, "save_total_limit": 1, "save_only_model": True}, 2, 6),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # all calls of all cases, on a machine that others use
    pytest.mark.skipif(not hasattr(os, "fork") or not torch.distributed.is_available(), reason="forks, and uses gloo"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair"))


def empty(out):
    """An empty directory, so that it does not depend on which process is the first to make it."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()


def build(trainers, out, options):
    trainers.append(make_run(out, **NEEDS, **options))
    return trainers[0]


def train_and_save(trainers, out, options):
    """What a user's script does: train, then save the model beside the checkpoints."""
    build(trainers, out, options).train()
    trainers[0].save_model()


def calls_of(pair, out, options, first_step):
    """For each process: the number of its first call at `first_step`, and its number of calls. Of a run left alone."""

    def action(rank, trainers):
        steps = []
        watch_files(lambda kind, path, tear: steps.append(trainers[0].state.global_step if trainers else 0))
        train_and_save(trainers, out, options)
        first = next((number for number, step in enumerate(steps, 1) if step >= first_step), len(steps) + 1)
        return first, len(steps)

    return pair.run(action)[0]


def expected_ends(pair, out, options):
    def action(rank, trainers):
        build(trainers, out, options).train()
        return end_of(trainers[0])

    return pair.run(action)[0]


def check_resume(pair, out, options, expected, where):
    """Both processes go on, from the same step, and end where they would have."""
    complete = complete_steps(out) if out.exists() else []
    visible = [name for name in os.listdir(out) if name.startswith("checkpoint-")] if out.exists() else []
    assert all(problems(out / name) == [] for name in visible), f"{where}: a half checkpoint"
    finished = max(complete, default=0) == options["max_steps"]

    def action(rank, trainers):
        if options.get("save_only_model"):  # nothing to resume from, but nothing in the way of a new run either
            build(trainers, out, options).train()
            return False, 0, difference(expected[rank], end_of(trainers[0]))
        resumed = resume_or_start(build(trainers, out, options))
        but = ("random",) if finished else ()
        return resumed, trainers[0]._run.first_step, difference(expected[rank], end_of(trainers[0]), but)

    results, _ = pair.run(action)
    first = 0 if options.get("save_only_model") else max(complete, default=0)
    assert results == [(bool(first), first, "")] * 2, where
    if not options.get("save_only_model"):  # a fresh start leaves alone what others may have staged
        assert all(".staged" not in name and ".deleted" not in name for name in os.listdir(out)), where
    return first


@pytest.mark.parametrize("case", CASES)
def test_two_processes_of_which_one_is_killed_at_any_call_of_a_save_resume_and_end_the_same(pair, tmp_path, case):
    options, first_step, sampled = CASES[case]
    out = tmp_path / "out"
    expected = expected_ends(pair, out, options)
    empty(out)
    calls = calls_of(pair, out, options, first_step)
    num_points = [0, 0]
    for die_rank, (first_call, num_calls) in enumerate(calls):
        every = 1 if EVERY or die_rank == 1 else sampled
        for point in range(first_call, num_calls + 1, every):
            empty(out)
            _, step = pair.run(
                lambda rank, trainers: train_and_save(trainers, out, options), die_rank=die_rank, point=point
            )
            where = f"process {die_rank} killed at call {point} of {num_calls}, at step {step}"
            assert step is not None and step >= first_step, where
            from_step = check_resume(pair, out, options, expected, where)
            assert options.get("save_only_model") or step - from_step <= options["save_steps"], where
            num_points[die_rank] += 1
    if case == "parts":  # process 1 writes them, too
        assert num_points[1] >= 4, num_points
        return
    # Process 1 writes its random states and nothing else.
    assert num_points[0] >= (30 if sampled == 1 else 5), num_points
    assert num_points[1] == 2 * (0 if options.get("save_only_model") else options["max_steps"] - first_step + 1)


@pytest.mark.parametrize("die_rank", [0, 1])
def test_a_process_left_alone_neither_waits_for_ever_nor_commits_half_a_checkpoint(pair, tmp_path, die_rank):
    options, first_step, _ = CASES["fresh"]
    out = tmp_path / "out"
    expected = expected_ends(pair, out, options)
    empty(out)
    first_call, num_calls = calls_of(pair, out, options, first_step)[die_rank]
    every = 1 if EVERY or die_rank == 1 else 12
    for point in range(first_call, num_calls + 1, every):
        empty(out)
        results, step = pair.run(
            lambda rank, trainers: train_and_save(trainers, out, options), die_rank, point, leave_other=True
        )
        where = f"process {die_rank} killed at call {point} of {num_calls}, at step {step}"
        assert step is not None, where
        assert die_rank == 0 or results == [None, None], f"{where}: process 0 went on alone"
        check_resume(pair, out, options, expected, where)


ASYNCHRONOUS = {"max_steps": 3, "save_steps": 1, "save_total_limit": 2, "async_save": True}
IN_PARTS = {**ASYNCHRONOUS, "fsdp": "full_shard", "fsdp_config": PARTS}
PACKED = {"model": PackedLanguage, "trainer": {"train_dataset": token_rows(20)}, "packing": True, "packing_length": 16}
OPTIONS = {
    "alone": ASYNCHRONOUS,
    "with packs and an average": {**ASYNCHRONOUS, **PACKED, "ema_decay": 0.5, "max_steps": 4},  # an epoch is 3 steps
    "in parts": IN_PARTS,
}
# Whose writer dies, and of how many of its calls one is a point.
WRITERS = {"whole": (ASYNCHRONOUS, 0, 9), "part 0": (IN_PARTS, 0, 20), "part 1": (IN_PARTS, 1, 5)}
NEVER = 10**9


def wait_for_writers(out):
    """Until those that outlived the processes have ended: a run that is resumed waits for real ones itself."""
    deadline = time.monotonic() + 60
    while [name for name in os.listdir(out) if ".staged-" in name and os.path.exists(f"/proc/{name.split('-')[-1]}")]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("case", WRITERS)
def test_two_processes_and_a_writer_killed_at_any_of_its_calls_resume_and_end_the_same(
    pair, tmp_path, monkeypatch, case
):
    options, die_rank, sampled = WRITERS[case]
    out, counted = tmp_path / "out", mmap.mmap(-1, 8)  # calls of the writer, which is a process of its own
    launch = writer.launch
    monkeypatch.setattr(writer, "PATIENCE_S", 0.3)

    def writer_dying_at(point):
        def prepare():
            def on_call(kind, path, tear):
                number = int.from_bytes(counted[:8], "little") + 1
                counted[:8] = number.to_bytes(8, "little")
                if number == point:
                    if tear is not None:
                        tear()
                    os.kill(os.getppid(), signal.SIGKILL)  # process 0, and process 1 with it
                    os.kill(os.getpid(), signal.SIGKILL)

            watch_files(on_call)

        counted[:8] = bytes(8)
        dying, other = forked_writer(prepare), forked_writer()
        return lambda: dying() if os.environ["RANK"] == str(die_rank) else other()

    monkeypatch.setattr(writer, "launch", forked_writer())
    expected = expected_ends(pair, out, options)
    empty(out)
    monkeypatch.setattr(writer, "launch", writer_dying_at(NEVER))
    pair.run(lambda rank, trainers: train_and_save(trainers, out, options))
    num_calls = int.from_bytes(counted[:8], "little")
    assert num_calls >= (20 if die_rank == 1 else 60)  # three checkpoints
    num_died = 0
    for point in range(1, num_calls + 1, 1 if EVERY else sampled):
        empty(out)
        monkeypatch.setattr(writer, "launch", writer_dying_at(point))
        results, _ = pair.run(
            lambda rank, trainers: train_and_save(trainers, out, options), die_rank=die_rank, point=NEVER
        )
        num_died += results[1 - die_rank] is None
        monkeypatch.setattr(writer, "launch", forked_writer())
        wait_for_writers(out)
        check_resume(pair, out, options, expected, f"killed at call {point} of {num_calls} of the writer")
    monkeypatch.setattr(writer, "launch", launch)
    assert num_died >= num_calls // (1 if EVERY else sampled) - 1


@pytest.mark.parametrize("case", OPTIONS)
def test_two_processes_killed_at_their_own_calls_of_an_asynchronous_save_resume_and_end_the_same(
    pair, tmp_path, monkeypatch, case
):
    options, out = OPTIONS[case], tmp_path / "out"
    monkeypatch.setattr(writer, "launch", forked_writer())
    monkeypatch.setattr(writer, "PATIENCE_S", 0.3)
    expected = expected_ends(pair, out, {**options, "async_save": False})
    empty(out)
    calls = calls_of(pair, out, options, first_step=2)
    for die_rank, (first_call, num_calls) in enumerate(calls):
        points = range(first_call, num_calls + 1, 1 if EVERY or die_rank == 1 else 6)
        if case == "in parts" and die_rank == 1:  # its writer writes all that it has
            assert not points
            continue
        assert len(points) >= 3
        for point in points:
            empty(out)
            _, step = pair.run(
                lambda rank, trainers: train_and_save(trainers, out, options), die_rank=die_rank, point=point
            )
            where = f"process {die_rank} killed at call {point} of {num_calls}, at step {step}"
            assert step is not None, where
            wait_for_writers(out)
            from_step = check_resume(pair, out, options, expected, where)
            assert step - from_step <= 2, where  # one save in flight, and the interval
