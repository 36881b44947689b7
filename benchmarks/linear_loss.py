"""Measure the cross-entropy of a linear head: from logits, by torch's `linear_cross_entropy`, by ours.

Owns: the contenders, and turns between them. Leaves to others: a whole training run (`fine_tuning.py`).

    python benchmarks/linear_loss.py                                      the table of docs/decisions/0008
    python benchmarks/linear_loss.py --classes 64000 --rows 307 --chunks  each chunk size, of one shape

CPU seconds of this process, so that other work on the machine counts little, for one forward and one backward pass; and
the most bytes of tensors above the inputs. `labelled`: the share of rows that have a label; torch's function is given
these rows only, as it does not leave out the others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from torch.nn import functional as F

from probes import MemoryCounter
from trainwright.linear_loss import function

SHAPES = ((8_000, 256), (64_000, 256), (250_000, 256))  # (classes, width)
CHUNKS = (64, 128, 256, 512, 1024, 2048)
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def of_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def ours(chunk: int | None, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """chunk: rows; None: as chosen."""
    if chunk is None:
        return function.linear_cross_entropy(hidden, weight, targets)
    with mock.patch.multiple(function, FEWEST_ROWS=chunk, CHUNK_BYTES=1):
        return function.linear_cross_entropy(hidden, weight, targets)


def of_torch(chunk: int | None, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """chunk: rows; None: as its options choose by themselves."""
    from torch.nn import LinearCrossEntropyOptions  # torch 2.13

    options = (
        LinearCrossEntropyOptions()
        if chunk is None
        else LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    )
    rows = (targets != -100).nonzero().squeeze(1)
    hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    return F.linear_cross_entropy(hidden, weight, targets, options=options)


def contenders(every_chunk: bool) -> Iterator[tuple[str, Loss]]:
    yield "logits", of_logits
    yield "ours", partial(ours, None)
    sizes = CHUNKS if every_chunk else (128, 256)
    if every_chunk:
        yield from ((f"ours, {size} rows", partial(ours, size)) for size in sizes)
    if hasattr(F, "linear_cross_entropy"):
        yield from ((f"torch, {size} rows", partial(of_torch, size)) for size in sizes)
        if every_chunk:
            yield "torch, by itself", partial(of_torch, None)


def measured(loss: Loss, inputs: tuple[torch.Tensor, ...], counts_memory: bool) -> tuple[float, float, float]:
    """(CPU seconds, MB of tensors, loss) of one pass."""
    hidden, weight, targets = inputs
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    memory = MemoryCounter() if counts_memory else None
    if memory is not None:
        memory.start()
    start = time.process_time()
    value = loss(hidden, weight, targets)
    value.backward()  # type: ignore[no-untyped-call]
    seconds = time.process_time() - start
    if memory is None:
        return seconds, 0.0, float(value.detach())
    memory.stop()
    return seconds, (memory.peak_bytes - memory.start_bytes) / 1e6, float(value.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, help="of one head; the default is three")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--labelled", type=float, default=0.3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--chunks", action="store_true", help="each chunk size, also of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = ((options.classes, options.width),) if options.classes else SHAPES[: 1 if options.quick else None]
    for classes, width in shapes:
        for name in options.dtypes:
            dtype = getattr(torch, name)
            torch.manual_seed(0)
            hidden, weight = torch.randn(options.rows, width).to(dtype), (torch.randn(classes, width) * 0.05).to(dtype)
            targets = torch.randint(0, classes, (options.rows,))
            targets[: options.rows - int(options.rows * options.labelled)] = -100
            inputs = hidden, weight, targets
            print(f"\n{classes:,} classes, width {width}, {options.rows} rows, {options.labelled:.0%} labelled, {name}")
            found = dict(contenders(options.chunks))
            seconds: dict[str, list[float]] = {contender: [] for contender in found}
            first = {
                contender: measured(loss, inputs, True) for contender, loss in found.items()
            }  # which also warms up
            for _ in range(1 if options.quick else options.rounds):
                for contender, loss in found.items():
                    seconds[contender].append(measured(loss, inputs, False)[0])
            base = statistics.median(seconds["logits"])
            for contender, (_, megabytes, value) in first.items():
                median = statistics.median(seconds[contender])
                print(f"  {contender:18} {median:7.3f} s  {median / base:5.2f}  {megabytes:7.0f} MB  loss {value:.5f}")


if __name__ == "__main__":
    main()
