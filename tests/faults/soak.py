"""Kill one run with SIGKILL at random moments, again and again; it must end bit for bit where the undisturbed run ends.

    python tests/faults/soak.py --kills 1000        # a few minutes; --seed for other moments

With `--async-save` the saves of the run are written by a process of its own, which outlives it.

Unlike the sweeps, a signal arrives anywhere: inside a write of C++ code, between two steps, while resuming. Each life
of the run is a forked child that resumes from the newest good checkpoint, or starts where there is none. A run that
ends before all kills are done is compared, and another begins.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import torch
from runs import complete_steps, difference, end_of, forked_writer, make_run, resume_or_start

from trainwright.checkpoint import writer

OPTIONS = {
    "save_steps": 3,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "gradient_accumulation_steps": 2,
    "logging_steps": 5,
}
STEPS_PER_KILL = 6


def one_life(out: Path, result: Path, max_steps: int, async_save: bool) -> None:
    """What a user's script does, in the child: go on if there is something to go on from, and write down the end."""
    torch.set_num_threads(1)
    writer.launch = forked_writer()
    run = make_run(out, max_steps=max_steps, async_save=async_save, **OPTIONS)
    resume_or_start(run)
    whole = end_of(run)
    torch.save({"tensors": whole["tensors"], "log": json.dumps(whole["log"], sort_keys=True)}, result)


def born(out: Path, result: Path, max_steps: int, async_save: bool) -> tuple[int, int]:
    """The child, and a pipe that ends when the child and its writer are gone."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            one_life(out, result, max_steps, async_save)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    return pid, read


def soak(num_kills: int, seed: int, folder: Path, async_save: bool = False) -> tuple[int, int]:
    """Kill `num_kills` times; (runs that ended, kills). Raises AssertionError for an end that differs."""
    moments = random.Random(seed)
    result = folder / "result"
    max_steps = STEPS_PER_KILL * max(num_kills, 10)
    make_run(folder / "warm", max_steps=2, **OPTIONS).train()  # the first run of a process is slower
    start = time.monotonic()
    reference = make_run(folder / "whole", max_steps=max_steps, **OPTIONS)
    reference.train()
    per_kill_s = (time.monotonic() - start) / num_kills
    expected = end_of(reference)
    start = time.monotonic()
    make_run(folder / "whole", max_steps=max_steps, **OPTIONS).train(resume_from_checkpoint=True)
    startup_s = time.monotonic() - start
    kills = runs = 0
    out = folder / "out"
    while True:
        newest = max(complete_steps(out), default=0) if out.exists() else 0
        pid, all_gone = born(out, result, max_steps, async_save)
        if kills < num_kills:
            # One life in four dies before or while it resumes; the others advance by what the run has for each kill.
            early = moments.random() < 0.25
            time.sleep(moments.uniform(0, startup_s) if early else startup_s + moments.uniform(0, 2 * per_kill_s))
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        # A started writer is found by its command line, and the run that resumes waits for it; a forked one has ours.
        os.read(all_gone, 1)
        os.close(all_gone)
        if code == -signal.SIGKILL:
            kills += 1
            now = max(complete_steps(out), default=0) if out.exists() else 0
            assert now >= newest, f"kill {kills}: step {newest} was there and now only {now}"
            continue
        assert code == 0, f"after {kills} kills a resume failed with {code}"
        found = torch.load(result, weights_only=True)
        assert difference({"tensors": expected["tensors"]}, found) == ""
        assert found["log"] == json.dumps(expected["log"], sort_keys=True), "the log differs"
        runs += 1
        if kills >= num_kills:
            return runs, kills
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async-save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs, kills = soak(options.kills, options.seed, Path(folder), options.async_save)
    print(f"{kills} kills, {runs} runs ended, each bit for bit like the undisturbed one")


if __name__ == "__main__":
    main()
