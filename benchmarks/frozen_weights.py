"""What a checkpoint costs when nine tenths of the weights are frozen: bytes written, time that training waits.

Owns: a frozen block of weights with a trained head, four ways to save it, the table. Leaves to others: checkpoints in
general (checkpoint_stall.py).

    python benchmarks/frozen_weights.py                     256 MiB frozen, in about a minute
    python benchmarks/frozen_weights.py --mib 4096 --saves 4

Bytes are counted (files whose inode no earlier checkpoint has) and exact. Times are medians of the pause between the
end of a step and the start of the next, over all saves but the first; the four ways take turns, `--rounds` times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import nn

from trainwright import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

WAYS = [(once, beside) for beside in (False, True) for once in ("always", "once")]


class Headed(nn.Module):
    """`mib` MiB of frozen weights, and a ninth of that which is trained; a step touches one row of each."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self.body = nn.ParameterList(
            nn.Parameter(torch.randn(1024, 1024), requires_grad=False) for _ in range(mib // 4)
        )
        self.head = nn.ParameterList(nn.Parameter(torch.randn(1024, 1024)) for _ in range(max(1, mib // 36)))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = sum((row[0].sum() * 1e-3 - labels.mean()) ** 2 for row in (*self.body, *self.head))
        return {"loss": loss, "logits": x}


class Pauses(TrainerCallback):
    """Seconds between the end of a step and the start of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._ended:
            self.seconds.append(time.perf_counter() - self._ended)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.async_save:
            time.sleep(args.settle_s)  # until the save before is on the disk
        self._ended = time.perf_counter()


def measure(way: tuple[str, bool], options: argparse.Namespace) -> tuple[list[float], int]:
    """(pauses at every save but the first and the last, bytes that the last checkpoint wrote for its weights)."""
    torch.manual_seed(0)
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * options.saves
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        args = TrainingArguments(
            folder, report_to="none", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=1, save_steps=1,
            max_steps=options.saves, logging_steps=1000, optim="sgd", save_frozen_weights=way[0], async_save=way[1],
        )  # fmt: skip
        args.settle_s = options.settle
        pauses = Pauses()
        trainer = Trainer(Headed(options.mib), args, train_dataset=rows, callbacks=[pauses])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        known = inodes(os.path.join(folder, f"checkpoint-{options.saves - 1}"))
        last = inodes(os.path.join(folder, f"checkpoint-{options.saves}"))
    return pauses.seconds[1:], sum(size for inode, size in last.items() if inode not in known)


def inodes(folder: str) -> dict[int, int]:
    """Inode -> size of the files with weights."""
    found = [os.stat(entry.path) for entry in os.scandir(folder) if entry.name.startswith("model")]
    return {status.st_ino: status.st_size for status in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="frozen weights")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settle", type=float, default=1.0, help="seconds that a save beside the training is given")
    parser.add_argument("--directory", help="where to save; the default is the system's directory for such files")
    options = parser.parse_args()
    pauses: dict[tuple[str, bool], list[float]] = {way: [] for way in WAYS}
    num_bytes: dict[tuple[str, bool], int] = {}
    for _ in range(options.rounds):
        for way in WAYS:
            seconds, num_bytes[way] = measure(way, options)
            pauses[way] += seconds
    print(f"\n{options.mib} MiB frozen; torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(
        "| save_frozen_weights | async_save | MiB of weights written per save | training waits (ms) |\n"
        "|---|---|---|---|"
    )
    for way in WAYS:
        waited_ms = 1e3 * statistics.median(pauses[way])
        print(f"| {way[0]} | {way[1]} | {num_bytes[way] / 2**20:.1f} | {waited_ms:.0f} |")


if __name__ == "__main__":
    main()
