"""Measure what the log history of a long run costs each save.

Owns: a log of a given length, saved again and again with new lines. Leaves to others: everything else in a checkpoint
(`checkpoint_stall.py`).

    python benchmarks/log_lines.py                     1,000 and 1,000,000 lines, in about a minute
    python benchmarks/log_lines.py --lines 100000      another length, beside 1,000

A save that is waited for writes the file (it is not flushed here); with `async_save` the run hands it over in shared
memory, and another process writes it. What is handed over is counted in bytes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trainwright.checkpoint import sink
from trainwright.checkpoint.save import save_trainer_state
from trainwright.checkpoint.shared_memory import Arena
from trainwright.checkpoint.snapshot import Job, Snapshot
from trainwright.state import TrainerState

FEW = 1000


def lines(number: int, begin: int = 0) -> list[dict[str, float]]:
    return [
        {"loss": 2.5 + 1 / (i + 1), "grad_norm": 1.0 + i % 7, "learning_rate": 1e-4, "epoch": i / 1000, "step": i}
        for i in range(begin, begin + number)
    ]


def save_s(state: TrainerState, options: argparse.Namespace, save: Callable[[], object]) -> float:
    """Median seconds of a save, each after new lines; the first, which encodes all, does not count."""
    seconds = []
    for _ in range(options.saves + 1):
        state.log_history += lines(options.new, len(state.log_history))
        begin = time.perf_counter()
        save()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def measure(number: int, options: argparse.Namespace) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory, arena = Path(name), Arena(1 << 20)
        state = TrainerState(log_history=lines(number), max_steps=10 * number)
        waited = save_s(state, options, lambda: save_trainer_state(directory, state))
        num_bytes = (directory / "trainer_state.json").stat().st_size

        def hand_over() -> None:
            arena.clear()
            with sink.opened(name, sink.Sink(Snapshot(arena, Job(name, f"{name}-final", 1, 1, {})))):
                save_trainer_state(directory, state)

        copied = save_s(state, options, hand_over)
        return f"| {number:,} | {num_bytes / 1e6:.1f} | {1e3 * waited:.2f} | {1e3 * copied:.2f} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000, help="lines of the long log (1,000,000)")
    parser.add_argument("--new", type=int, default=100, help="new lines before each save (100)")
    parser.add_argument("--saves", type=int, default=9, help="saves of each log (9)")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where the files go (the system's scratch)")
    options = parser.parse_args(arguments)
    for name in ("lines", "new", "saves"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: it must be 1 or more")
    print("| log lines | MB of trainer_state.json | ms of a save that is waited for | ms of the run, async_save |")
    print("|---:|---:|---:|---:|")
    for number in (FEW, options.lines):
        print(measure(number, options))


if __name__ == "__main__":
    main()
