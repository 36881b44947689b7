"""Measure what training loops keep in memory: bytes of tensors at the peak of a step, and what grows with the steps.

Owns: the measurements and the table. Leaves to others: the loops (`contenders`), the work (`toy`), counting (`probes`).
Counts, so exact: the same on every machine with the same versions.

    python benchmarks/memory.py                     two tables, in about two minutes
    python benchmarks/memory.py --steps 1000        growth over fewer steps
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import sys
from collections.abc import Callable
from typing import Any

import torch

import probes
import toy
from contenders import CONTENDERS, Contender

FIRST, NUM_STEPS = 25, 100  # a quarter of the way from one log line to the next, so both ends are alike


def quietly(contender: Contender, num_steps: int, start: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run a loop; `start` at the batch of step `FIRST`, `stop` at that `num_steps` later."""
    size, silence = contender.micro_batches, io.StringIO()
    collator = toy.MeasuringCollator(FIRST * size, (FIRST + num_steps) * size, start, stop)
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        contender.run(collator, FIRST + num_steps + 2, True)


def peak(contender: Contender) -> dict[str, float]:
    counter = probes.MemoryCounter()
    quietly(contender, NUM_STEPS, counter.start, counter.stop)
    return counter.result()


def growth(contender: Contender, num_steps: int) -> dict[str, int]:
    """Python objects, and bytes of tensors, that `num_steps` steps left behind."""
    counts: list[tuple[int, int]] = []

    def count() -> None:
        gc.collect()
        objects = gc.get_objects()
        storages = {
            item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
            for item in objects
            if probes.has_storage(item)
        }
        counts.append((len(objects), sum(storages.values())))

    quietly(contender, num_steps, count, count)
    (objects, num_bytes), (objects_after, bytes_after) = counts
    return {"objects": objects_after - objects, "bytes": bytes_after - num_bytes}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="steps over which growth is measured (10000)")
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
    print(f"\n| left behind by {options.steps:>6,} steps | Python objects | bytes of tensors |")
    print("|-----------------------------|----------------|------------------|")
    for one in chosen:
        left = growth(one, options.steps)
        print(f"| {one.name:<27} | {left['objects']:>+14,} | {left['bytes']:>+16,} |")


if __name__ == "__main__":
    main()
