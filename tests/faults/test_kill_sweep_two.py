"""Kill one of two processes at every file-system call of a save: both resume, and end where nobody was killed.

Each point is two forked children that really train together (gloo, a file for a store). One dies by SIGKILL; the other
is killed with it, as torchrun does, or left alone. Then two more children resume and compare their end with the
undisturbed run's, each its own. By default every call of one case and a sample of the others is a point; all of them
with TRAINWRIGHT_FULL_SWEEP=1.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import shutil
import signal
import sys
import time
import traceback

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from runs import complete_steps, difference, end_of, make_run, resume_or_start, watch_files

from trainwright.checkpoint.manifest import problems

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # the first evaluation is the best, so rotation has to go round it
}
EVERY = os.environ.get("TRAINWRIGHT_FULL_SWEEP") == "1"
PATIENCE_S = 60  # after which a process that lost its partner counts as hanging
NEEDS = {"per_device_train_batch_size": 2, "ddp_timeout": 30}

# Options, the step from whose save on calls are points, and of how many calls of process 0 one is a point.
CASES = {
    "rotating": ({"max_steps": 3, "save_steps": 1, "save_total_limit": 2}, 3, 1),
    "fresh": ({"max_steps": 2, "save_steps": 1}, 1, 8),
    "best": ({"max_steps": 3, "save_steps": 1, **BEST}, 3, 6),
    "weights only": ({"max_steps": 2, "save_steps": 1, "save_total_limit": 1, "save_only_model": True}, 2, 6),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork") or not torch.distributed.is_available(), reason="forks, and uses gloo"),
]


class Pair:
    """Two processes that train together, forked from this one, which has imported all they need."""

    def __init__(self, folder):
        self.folder, self.numbers = folder, itertools.count()

    def run(self, action, die_rank=None, point=0, leave_other=False):
        """`action(rank, trainers)` in both; process `die_rank` kills itself at its `point`-th file-system call.

        What each returned (None: it raised or was killed), and the step of the one that died (None: it lived).
        """
        base = self.folder / f"pair-{next(self.numbers)}"
        base.mkdir()
        shared = mmap.mmap(-1, 8)  # the step at which it died, plus one
        children = {rank: self._fork(action, rank, base, shared, die_rank, point) for rank in (0, 1)}
        codes, deadline = {}, time.monotonic() + PATIENCE_S
        while children:
            for rank, pid in list(children.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    del children[rank]
            is_late = time.monotonic() > deadline
            if is_late or (codes.get(die_rank) == -signal.SIGKILL and not leave_other):
                for rank, pid in children.items():
                    os.kill(pid, signal.SIGKILL)
            if is_late:
                raise AssertionError(f"after {PATIENCE_S} s process {list(children)} still waits; the others: {codes}")
            time.sleep(0.001)
        errors = [path.read_text() for path in self.folder.glob("error-*")]
        assert not errors, "\n".join(errors)
        results = []
        for rank in (0, 1):
            path = base / f"result-{rank}"
            results.append(pickle.loads(path.read_bytes()) if codes[rank] == 0 else None)
        shutil.rmtree(base)
        died_at = int.from_bytes(shared[:8], "little")
        return results, (died_at - 1 if died_at else None)

    def _fork(self, action, rank, base, shared, die_rank, point):
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # nobody listens: the store is a file
            torch.set_num_threads(1)
            torch.distributed.init_process_group("gloo", init_method=f"file://{base}/store", rank=rank, world_size=2)
            trainers, left = [], point

            def die(kind, path, tear):
                nonlocal left
                left -= 1
                if left == 0:
                    if tear is not None:
                        tear()
                    shared[:8] = ((trainers[0].state.global_step if trainers else 0) + 1).to_bytes(8, "little")
                    os.kill(os.getpid(), signal.SIGKILL)

            if rank == die_rank:
                watch_files(die)
            result = action(rank, trainers)
            if rank != die_rank:
                (base / f"result-{rank}").write_bytes(pickle.dumps(result))
            code = 0
        except BaseException:
            if die_rank is None:  # nobody died, so nothing may fail
                (self.folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(code)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    import accelerate.data_loader  # noqa: F401
    import datasets  # noqa: F401  what accelerate imports when it prepares a loader

    import trainwright.parallel.agreement
    import trainwright.parallel.distributed  # noqa: F401

    folder = tmp_path_factory.mktemp("pair")
    make_run(folder / "warm", max_steps=1, save_steps=1).train()
    return Pair(folder)


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
        return resumed, trainers[0]._first_step_of_run, difference(expected[rank], end_of(trainers[0]), but)

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
