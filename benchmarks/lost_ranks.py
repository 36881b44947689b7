"""What a rank that is killed or hangs costs: time until all have ended, and until the run continues after a restart.

Owns: starting and disturbing two processes, and the script that they run. Leaves to others: the table
(`scaling.py --lost`). All times are wall time, so a busy machine makes them longer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = time.time()  # before the imports that take long, which no trainer can save
NUM_PROCESSES, DISTURBED_STEP, SAVE_STEPS, STEP_S = 2, 25, 10, 0.01
NAMED, HANGS = "Rank 1 of 2 is gone", "Rank 1 of 2 took no part"
LIMIT_S = 300.0


def train(directory: str, accident: str, ddp_timeout: int) -> None:
    """In each process: train, note each step; in the first life rank 1 has an accident, the second makes one step."""
    import accelerate.data_loader  # noqa: F401  what a run of several processes imports

    import toy
    from trainwright import Trainer, TrainerCallback, TrainingArguments

    imported, life = time.time(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    class Notes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            time.sleep(STEP_S)
            if args.process_index == 1 and life == 0 and state.global_step == DISTURBED_STEP:
                note("accident")
                if accident == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif accident == "hang":
                    time.sleep(LIMIT_S)
            if life > 0 or accident == "none":
                note("step", number=state.global_step)
                control.should_training_stop = True

    def note(what: str, **more: Any) -> None:
        line = {"what": what, "rank": args.process_index, "life": life, "time": time.time(), **more}
        with open(Path(directory, "events"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    args = TrainingArguments(
        directory, max_steps=1_000, per_device_train_batch_size=toy.BATCH_SIZE, save_steps=SAVE_STEPS,
        report_to="none", use_cpu=True, disable_tqdm=True, ddp_timeout=ddp_timeout, logging_steps=1000,
    )  # fmt: skip
    note("begin", time=BEGAN)
    note("imported", time=imported)
    Trainer(toy.ToyModel(), args, train_dataset=toy.ToyData(100_000), callbacks=[Notes()]).train()


def by_torchrun(*more: str) -> Callable[[list[str], Path], list[subprocess.Popen[bytes]]]:
    def start(script: list[str], output: Path) -> list[subprocess.Popen[bytes]]:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}", *more]
        with open(output, "wb") as file:
            return [subprocess.Popen([sys.executable, "-m", *launcher, *script], stdout=file, stderr=file)]

    return start


def alone(script: list[str], output: Path) -> list[subprocess.Popen[bytes]]:
    """By a launcher that ends nobody when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with open(output, "wb") as file:
        return [
            subprocess.Popen(
                [sys.executable, *script], stdout=file, stderr=file,
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            )
            for rank in range(NUM_PROCESSES)
        ]  # fmt: skip


def disturbed(
    start: Callable[[list[str], Path], list[subprocess.Popen[bytes]]], accident: str, line: str, ddp_timeout: int = 1800
) -> tuple[float, list[dict[str, Any]]]:
    """(time at which all had ended, what the processes noted). AssertionError where `line` was not said."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output.txt")
        script = [__file__, "--directory", str(Path(folder, "run")), "--accident", accident]
        Path(folder, "run").mkdir()
        processes = start([*script, "--ddp-timeout", str(ddp_timeout)], output)
        try:
            for process in processes:
                process.wait(LIMIT_S)
            ended = time.time()
        finally:
            for process in processes:
                process.kill()
        assert line in output.read_text(errors="replace"), output.read_text(errors="replace")[-6000:]
        events = Path(folder, "run", "events").read_text().splitlines()
        return ended, [json.loads(event) for event in events]


def first(events: list[dict[str, Any]], what: str, life: int = 0, rank: int | None = None) -> float:
    return next(
        float(one["time"])
        for one in events
        if (one["what"], one["life"]) == (what, life) and rank in (None, one["rank"])
    )


def until_all_have_ended(start: Any, accident: str, line: str, ddp_timeout: int = 1800) -> float:
    ended, events = disturbed(start, accident, line, ddp_timeout)
    return ended - first(events, "accident")


def until_the_next_step() -> dict[str, float]:
    """Seconds from the kill of a rank to the first step after the restart by torchrun, and what of them is what."""
    _, events = disturbed(by_torchrun("--max-restarts=1"), "kill", "the run is resumed from")
    killed, begin, imported = first(events, "accident"), first(events, "begin", 1, 0), first(events, "imported", 1, 0)
    step = next(one for one in events if one["what"] == "step")
    assert step["number"] == DISTURBED_STEP // SAVE_STEPS * SAVE_STEPS + 1, step
    return {
        "torchrun": begin - killed,
        "imports": imported - begin,
        "resume": step["time"] - imported,
        "beyond imports": step["time"] - killed - (imported - begin),
    }


def table(rounds: int) -> str:
    rows: list[tuple[str, list[float], str]] = []

    def row(name: str, values: list[float], target: str = "") -> None:
        rows.append((name, values, target))

    row("killed, no launcher ends the others", [until_all_have_ended(alone, "kill", NAMED) for _ in range(rounds)])
    row("killed, torchrun", [until_all_have_ended(by_torchrun(), "kill", "exitcode  : -9") for _ in range(rounds)])
    hung = [until_all_have_ended(alone, "hang", HANGS, ddp_timeout=8) for _ in range(rounds)]
    row("hangs, ddp_timeout=8", hung, "16")
    restarts = [until_the_next_step() for _ in range(rounds)]
    for name in restarts[0]:
        target = "3" if name == "beyond imports" else ""
        row(f"killed, to the next step: {name}", [one[name] for one in restarts], target)
    lines = [
        f"| {'s from the accident of rank 1':<44} | median | least | target |",
        f"| {'-' * 44} | --- | --- | --- |",
    ]
    for name, values, target in rows:
        lines.append(f"| {name:<44} | {statistics.median(values):.2f} | {min(values):.2f} | {target} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--accident", required=True)
    parser.add_argument("--ddp-timeout", type=int, required=True)
    options = parser.parse_args()
    train(options.directory, options.accident, options.ddp_timeout)
