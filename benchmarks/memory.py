"""Measure what training loops keep in memory: bytes of tensors at the peak of a step, and what grows with the steps.

Owns: the measurements and the table. Leaves to others: the loops (`contenders`), the work (`toy`), counting (`probes`).
Counts of tensors and objects are exact: the same on every machine with the same versions. The memory of the process is
what the system says, and moves by some pages.

    python benchmarks/memory.py                     two tables, in some minutes
    python benchmarks/memory.py --steps 2000        growth over fewer steps
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import probes
import toy
from contenders import CONTENDERS, Contender, with_trainer

FIRST, NUM_STEPS = 25, 100  # a quarter of the way from one log line to the next, so both ends are alike


def evaluating_and_saving(every: int) -> Contender:
    """Ours as it is used: all default callbacks, a log line, an evaluation and a checkpoint every so many steps."""
    steps = {"eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every}
    run = with_trainer("trainwright", logging_steps=every, per_device_eval_batch_size=toy.BATCH_SIZE, **steps)
    return Contender("trainwright, evaluating and saving", "trainwright", run)


def quietly(contender: Contender, first: int, last: int, start: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run a loop to step `last`; `start` at the batch of step `first`, `stop` at that of `last`."""
    collator, silence = toy.MeasuringCollator(first, last, start, stop), io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        contender.run(collator, last + 2, True)


def peak(contender: Contender) -> dict[str, float]:
    counter = probes.MemoryCounter()
    quietly(contender, FIRST, FIRST + NUM_STEPS, counter.start, counter.stop)
    return counter.result()


def growth(contender: Contender, first: int, last: int, evaluated_every: int = 0) -> dict[str, int]:
    """Python objects, bytes of tensors and KiB of the process that the steps from `first` to `last` left behind."""
    counts: list[tuple[int, int, int]] = []

    def count() -> None:
        gc.collect()
        objects = gc.get_objects()
        storages = {
            item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
            for item in objects
            if probes.has_storage(item)
        }
        num_objects = len(objects)
        del objects  # a list of some MiB
        counts.append((num_objects, sum(storages.values()), resident_kib()))

    count()  # what counting itself leaves behind
    counts.clear()
    # Evaluations take their batches from the same collator.
    begin, end = (
        step + (toy.EVAL_BATCHES * ((step - 1) // evaluated_every) if evaluated_every else 0) for step in (first, last)
    )
    quietly(contender, begin, end, count, count)
    before, after = counts
    return dict(zip(("objects", "bytes", "kib"), (now - then for now, then in zip(after, before))))


def resident_kib() -> int:
    """Memory of this process that is not swapped out; 0 where the system does not say (it is not Linux)."""
    try:
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except OSError:
        return 0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="the last step of growth (10000)")
    parser.add_argument("--every", type=int, default=500, help="steps from one evaluation and checkpoint to the next")
    parser.add_argument("--width", type=int, default=512, help="width of the model whose peak is measured (512)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only loops whose name contains one of these texts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [one for one in CONTENDERS if not options.only or any(text in one.name for text in options.only)]
    chosen = [one for one in chosen if one.is_installed and not one.variant and one.micro_batches == 1]
    if not chosen:
        sys.exit(f"No loop that is installed has {' or '.join(options.only)} in its name.")
    toy_width, toy.WIDTH = toy.WIDTH, options.width
    peaks: list[tuple[Contender, Any]] = [(one, peak(one)) for one in chosen]
    toy.WIDTH = toy_width
    bare = next((found["peak_bytes"] for one, found in peaks if one.name == "bare loop"), None)
    print(f"| tensors at the peak of a step, width {options.width} | version    |      bytes | ratio to bare |")
    print("|--------------------------------------------|------------|------------|---------------|")
    for one, found in peaks:
        ratio = f"{found['peak_bytes'] / bare:.4f}" if bare else ""
        print(f"| {one.name:<42} | {one.version:<10} | {found['peak_bytes']:>10,} | {ratio:>13} |")
    first = options.steps // 10 + FIRST
    span = f"steps {first:,} to {options.steps + FIRST:,}"
    print(f"\n| left behind by {span:<22} | Python objects | bytes of tensors | KiB of the process |")
    print("|---------------------------------------|----------------|------------------|--------------------|")
    used = [(one, 0) for one in chosen]
    if any(one.name == "trainwright" for one in chosen):
        used.append((evaluating_and_saving(options.every), options.every))
    for one, every in used:
        left = growth(one, first, options.steps + FIRST, every)
        print(f"| {one.name:<37} | {left['objects']:>+14,} | {left['bytes']:>+16,} | {left['kib']:>+18,} |")


if __name__ == "__main__":
    main()
