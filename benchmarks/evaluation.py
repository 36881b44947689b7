"""Measure what an evaluation costs: collecting logits, and the whole loop above a forward pass.

Owns: the loops, their order, the tables. Leaves to others: what is measured (`probes`).

    python benchmarks/evaluation.py                      both tables, in several minutes
    python benchmarks/evaluation.py --rounds 0           counts only
    python benchmarks/evaluation.py --model 256          a forward pass of more work (two layers of that width)
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import probes

BATCH_SIZE, NUM_CLASSES = 4, 512  # of the whole loop
ROWS, WIDTH, NUM_BATCHES = 8, 4000, 1000  # of collecting alone
Run = Callable[[int], None]  # evaluates so many batches


class Model(nn.Module):
    """Logits over 512 classes; `width` decides how much a forward pass has to do."""

    main_input_name = "input_ids"

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, width)
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.hidden(self.embedding(input_ids)).mean(dim=1))  # (batch, classes)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@functools.cache
def model_of(width: int) -> Model:
    """One model for all loops: where its weights happen to lie in memory changes a pass by more than a loop costs."""
    return Model(width)


class Data(Dataset[dict[str, torch.Tensor]]):
    """`length` samples of 8 tokens."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 64, (64, 8), generator=generator)
        self.labels = torch.randint(0, NUM_CLASSES, (64,), generator=generator)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index % 64], "labels": self.labels[index % 64]}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def forward_only(width: int = 16) -> Run:
    """The loop that nothing can be cheaper than: it reads the data, calls the model, and forgets what it returned."""
    model = model_of(width).eval()

    def run(num_batches: int) -> None:
        with torch.no_grad():
            for batch in DataLoader(Data(num_batches * BATCH_SIZE), batch_size=BATCH_SIZE, collate_fn=collate):
                model(**batch)

    return run


def by_hand(width: int = 16) -> Run:
    """What a careful user writes: losses, logits and labels are kept and joined at the end."""
    model = model_of(width).eval()

    def run(num_batches: int) -> None:
        losses, logits, labels = [], [], []
        with torch.no_grad():
            for batch in DataLoader(Data(num_batches * BATCH_SIZE), batch_size=BATCH_SIZE, collate_fn=collate):
                outputs = model(**batch)
                losses.append(outputs["loss"])
                logits.append(outputs["logits"])
                labels.append(batch["labels"])
        torch.stack(losses).mean().item(), torch.cat(logits).numpy(), torch.cat(labels).numpy()

    return run


def library(package: str) -> Any:
    return importlib.import_module(package)


def with_trainer(
    package: str,
    output_dir: Any,
    width: int = 16,
    cls: type | None = None,
    compute_metrics: Any = None,
    **arguments: Any,
) -> Run:
    """`Trainer.evaluate` of `package`, with its default callbacks and progress bar; a metric makes it keep all rows."""
    names = library(package)
    trainer = (cls or names.Trainer)(
        model=model_of(width),
        args=names.TrainingArguments(
            output_dir=str(output_dir),
            per_device_eval_batch_size=BATCH_SIZE,
            report_to="none",
            use_cpu=True,
            disable_tqdm=False,
            **arguments,
        ),
        data_collator=collate,
        compute_metrics=compute_metrics or (lambda prediction: {"rows": float(len(prediction.label_ids))}),
    )

    def run(num_batches: int) -> None:
        trainer.evaluate(Data(num_batches * BATCH_SIZE))

    return run


# ----------------------------------------------------------------------------------------------------- collecting ----


def collect(batches: list[torch.Tensor]) -> None:
    from trainwright.evaluation.prediction_store import EvalLoopContainer

    container = EvalLoopContainer()
    for batch in batches:
        container.add(batch)
    container.get_arrays()


def concatenate_repeatedly(batches: list[torch.Tensor]) -> None:
    """Appends each batch to all before it, which copies everything every time."""
    from trainwright.nested import nested_concat, nested_numpify

    joined = None
    for batch in batches:
        joined = batch if joined is None else nested_concat(joined, batch)
    nested_numpify(joined)


def reference_container(batches: list[torch.Tensor]) -> None:
    """The container of the installed transformers."""
    from transformers.trainer_pt_utils import EvalLoopContainer  # type: ignore[attr-defined]

    container = EvalLoopContainer(True, padding_index=-100)
    for batch in batches:
        container.add(batch)
    container.get_arrays()


# ------------------------------------------------------------------------------------------------------ the tables ----


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextlib.contextmanager
def silence() -> Any:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def calls_of(run: Run, num_batches: int) -> tuple[float, float]:
    """Python and C calls of one batch more, in the middle of a pass."""
    totals = []
    with silence(), probes.still_progress_bars():
        run(20)
        for number in (num_batches, 2 * num_batches):
            counter = probes.CallCounter()
            counter.start()
            run(number)
            counter.stop()
            totals.append((counter.num_python, counter.num_c))
    (python_1, c_1), (python_2, c_2) = totals
    return (python_2 - python_1) / num_batches, (c_2 - c_1) / num_batches


def print_collecting(rounds: int) -> None:
    batches = [torch.randn(ROWS, WIDTH) for _ in range(NUM_BATCHES)]
    ways: dict[str, tuple[Callable[[list[torch.Tensor]], None], int]] = {
        "trainwright": (collect, rounds),
        "repeated concatenation": (concatenate_repeatedly, 1),  # takes minutes
    }
    if importlib.util.find_spec("transformers"):
        ways["transformers' container"] = (reference_container, 1)
    print(f"\nCollecting {NUM_BATCHES} batches of {ROWS} x {WIDTH} float32 logits ({rounds} rounds):\n")
    print("| way | ms: median (min) |\n|---|---|")
    for name, (way, number) in ways.items():
        times = [1e3 * seconds(functools.partial(way, batches)) for _ in range(number)]
        print(f"| {name} | {statistics.median(times):.0f} ({min(times):.0f}) |", flush=True)


def print_loops(rounds: int, width: int) -> None:
    directory = tempfile.mkdtemp()
    loops: dict[str, Run] = {
        "forward only": forward_only(width),
        "by hand": by_hand(width),
        f"trainwright {version('trainwright')}": with_trainer("trainwright", directory, width),
    }
    if importlib.util.find_spec("transformers"):
        loops[f"transformers {version('transformers')}"] = with_trainer("transformers", directory, width)
    print(f"\nA whole evaluation, batches of {BATCH_SIZE} x {NUM_CLASSES} logits, model width {width}:\n")
    print("| loop | batches | Python calls per batch | C calls per batch | us per batch: median (min) | ratio |")
    print("|---|---|---|---|---|---|")
    for num_batches in (500, 4000):
        times: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(rounds):
            for name, run in loops.items():  # in turns, so that all meet the same disturbances
                with silence():
                    times[name].append(1e6 * seconds(functools.partial(run, num_batches)) / num_batches)
        for name, run in loops.items():
            python_calls, c_calls = calls_of(run, 50)
            cells = [name, str(num_batches), f"{python_calls:.0f}", f"{c_calls:.0f}"]
            if rounds:
                ratios = [one / bare for one, bare in zip(times[name], times["forward only"])]
                cells += [f"{statistics.median(times[name]):.0f} ({min(times[name]):.0f})"]
                cells += [f"{statistics.median(ratios):.3f}"]
            else:
                cells += ["", ""]
            print("| " + " | ".join(cells) + " |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing, all loops in turn (5); 0: counts only")
    parser.add_argument("--threads", type=int, default=1, help="threads torch may use (1: least disturbed)")
    parser.add_argument("--model", type=int, default=1024, metavar="WIDTH", help="width of the model (1024)")
    parser.add_argument("--no-collecting", action="store_true", help="leave out the first table, which takes a minute")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    machine = f"{os.cpu_count()} CPU cores, {options.threads} threads"
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {machine}")
    if options.rounds and not options.no_collecting:
        print_collecting(options.rounds)
    print_loops(options.rounds, options.model)


if __name__ == "__main__":
    main()
