"""Measure how long a checkpoint keeps a training step waiting, and what a checkpoint at every step costs in all.

Owns: a small language model, the order of measurements, both tables, the JSON. Leaves to others: `step_overhead`, from
which the progress line and the description of the machine come.

    python benchmarks/checkpoint_stall.py                      both tables, in about three minutes
    python benchmarks/checkpoint_stall.py --layers 12 --width 768 --vocabulary 50257 --batch 4 --length 128
                                                               the same for 124 million parameters
    torchrun --nproc-per-node 2 benchmarks/checkpoint_stall.py --sharded
                                                               another table: sharded checkpoints of FSDP2, beside one
                                                               copy of the local shard, by both processes at once
    python benchmarks/checkpoint_stall.py --stagers            another table: our copy of the state in shared memory
                                                               beside torch's (torch.distributed.checkpoint.staging)

A stall is the time between the end of an optimizer step and the next `training_step`, at steps with a save, less the
same time at steps without one. All loops are measured in turn, round by round, on the same model, batches and disk.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probes import CallCounter, UndisturbedStopwatch
from step_overhead import Progress, environment

STEPS_BETWEEN_SAVES = 4  # enough for a save to be on the disk before the next; more where --settle says so


class LanguageModel(nn.Module):
    """A decoder of `layers` blocks with tied embeddings; returns its loss."""

    def __init__(self, layers: int, width: int, vocabulary: int, length: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        block = lambda: nn.TransformerEncoderLayer(  # noqa: E731
            width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1], device=input_ids.device)
        hidden = self.tokens(input_ids) + self.places[: input_ids.shape[1]]  # (batch, length, width)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits = self.norm(hidden) @ self.tokens.weight.t()  # (batch, length, vocabulary)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Gaps:
    """The seconds between the end of each optimizer step and `training_step` after it, and when each step ended."""

    def __init__(self, device: torch.device, optimizer: torch.optim.Optimizer) -> None:
        self.gaps_s: list[float] = []
        self.ends_s: list[float] = []
        self.cpu_gaps_s: list[float] = []
        self.device = device
        # Several processes that train leave no core to those that write, which get none between the two moments.
        self.undisturbed = UndisturbedStopwatch() if torch.distributed.is_initialized() else None
        optimizer.register_step_post_hook(lambda *_: self._end())

    def begin(self) -> None:
        if len(self.gaps_s) < len(self.ends_s):
            self.gaps_s.append(self._now() - self.ends_s[-1])
            self.cpu_gaps_s.append(time.process_time() - self._cpu_s)
            if self.undisturbed is not None:
                self.undisturbed.stop()

    def _end(self) -> None:
        if self.undisturbed is not None:
            self.undisturbed.start()
            torch.distributed.barrier()  # the save is not to wait for a process that still trains
        self.ends_s.append(self._now())
        self._cpu_s = time.process_time()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return time.perf_counter()


def train(options: argparse.Namespace, package: str, num_steps: int, save_steps: int, **arguments: Any) -> Gaps:
    """Train with the Trainer of `package` and return what was measured; `save_steps` 0: no checkpoint."""
    library = importlib.import_module(package)
    on_cpu = options.cpu or not torch.cuda.is_available()
    model = LanguageModel(options.layers, options.width, options.vocabulary, options.length)
    model.to("cpu" if on_cpu else "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    gaps = Gaps(next(model.parameters()).device, optimizer)

    class Measured(library.Trainer):  # type: ignore[name-defined,misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            gaps.begin()
            return super().training_step(*args, **kwargs)

    row = torch.arange(options.length) % options.vocabulary
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as own_directory,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        (directory,) = of_first([own_directory])
        saving = {"save_strategy": "steps", "save_steps": save_steps} if save_steps else {"save_strategy": "no"}
        args = library.TrainingArguments(
            directory, max_steps=num_steps, per_device_train_batch_size=options.batch, report_to="none",
            disable_tqdm=True, logging_steps=10**6, use_cpu=on_cpu, save_total_limit=1, **saving, **arguments,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row}] * (num_steps * options.batch)
        Measured(model, args, train_dataset=data, optimizers=(optimizer, schedule)).train()
    return gaps


def stall_s(options: argparse.Namespace, package: str, **arguments: Any) -> list[float]:
    """The stall of each save of a run, but for the first, in which memory and files are made."""
    interval = options.settle
    gaps = train(options, package, interval * (options.saves + 1) + 1, interval, **arguments).gaps_s
    return above_the_others(gaps, interval)


def above_the_others(gaps: list[float], interval: int) -> list[float]:
    """What the gaps at saves are above those without one."""
    at_saves = [gap for step, gap in enumerate(gaps, start=1) if step % interval == 0]
    others = [gap for step, gap in enumerate(gaps, start=1) if step % interval and step > interval]
    return [gap - statistics.median(others) for gap in at_saves[1:]]


def of_first(values: list[Any]) -> list[Any]:
    """`values` as the first of several processes has them."""
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values, src=0)
    return values


PARTS = {"fsdp": "full_shard", "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}


def measure_sharded(options: argparse.Namespace) -> dict[str, Any]:
    """In each of several processes: stalls of sharded saves, and one copy of as many bytes by all of them at once."""
    rows: dict[str, dict[str, list[float]]] = {}
    interval, num_bytes = options.settle, 0
    for _ in range(options.rounds):
        copies = rows.setdefault("one copy of the local shard", {"wall_s": [], "cpu_s": []})
        for name, arguments in {"waited for": {}, "async_save": {"async_save": True}}.items():
            gaps = train(options, "trainwright", interval * (options.saves + 1) + 1, interval, **PARTS, **arguments)
            row = rows.setdefault(f"trainwright, {name}", {"wall_s": [], "cpu_s": []})
            row["wall_s"] += above_the_others(gaps.gaps_s, interval)
            row["cpu_s"] += above_the_others(gaps.cpu_gaps_s, interval)
        num_bytes = num_bytes or sum(t.nbytes for state in state_of(options) for t in tensors_in(state))
        share = num_bytes // torch.distributed.get_world_size()
        source, target = torch.ones(share, dtype=torch.uint8), torch.zeros(share, dtype=torch.uint8)
        for _ in range(options.saves):
            undisturbed = UndisturbedStopwatch()
            undisturbed.start()
            torch.distributed.barrier()
            cpu_s = time.process_time()
            copies["wall_s"].append(timed(functools.partial(target.copy_, source)))
            copies["cpu_s"].append(time.process_time() - cpu_s)
            undisturbed.stop()
    return {"state_bytes": num_bytes, "rows": rows}


def tensors_in(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for value in state.values() for tensor in tensors_in(value)] if isinstance(state, dict) else []


def sharded_table(rows: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| a sharded save keeps a step waiting for | ms: median (min to max) | copies | CPU, copies |",
        "|---|---:|---:|---:|",
    ]
    base = {kind: statistics.median(values) for kind, values in rows["one copy of the local shard"].items()}
    for name, row in rows.items():
        times = [1e3 * value for value in row["wall_s"]]
        ratios = [statistics.median(row[kind]) / base[kind] for kind in ("wall_s", "cpu_s")]
        lines.append(
            f"| {name} | {statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f}) | {ratios[0]:.2f} | "
            f"{ratios[1]:.2f} |"
        )
    return "\n".join(lines)


def state_of(options: argparse.Namespace) -> list[Any]:
    """The state that a checkpoint of this model holds: its weights and two moments of Adam for each."""
    model = LanguageModel(options.layers, options.width, options.vocabulary, options.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return [model.state_dict(), optimizer.state_dict()]


def copy_s(options: argparse.Namespace) -> list[float]:
    """One copy of the state's bytes in memory that is already there."""
    weights, states = state_of(options)
    num_bytes = sum(t.nbytes for t in weights.values())
    num_bytes += sum(t.nbytes for state in states["state"].values() for t in state.values())
    options.state_bytes = num_bytes
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    return [timed(lambda: target.copy_(source)) for _ in range(options.saves)]


def torch_save_s(options: argparse.Namespace) -> list[float]:
    """`torch.save` of the state, as a loop without a framework has it; the disk is not asked to confirm."""
    state = state_of(options)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        return [timed(lambda: torch.save(state, os.path.join(directory, "state.pt"))) for _ in range(options.saves)]


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run_s(options: argparse.Namespace, **arguments: Any) -> float:
    """Seconds per step of a run, from the end of its third step to the end of its last; saving is part of it.

    The last save and the wait for it are not: they come once, whatever the length of a run.
    """
    ends = train(options, "trainwright", options.steps, **arguments).ends_s
    return (ends[-1] - ends[2]) / (len(ends) - 3)


Row = tuple[str, str, Callable[[argparse.Namespace], list[float]]]
STALLS: list[Row] = [
    ("one copy of the same bytes", "torch", copy_s),
    ("torch.save", "torch", torch_save_s),
    ("trainwright, waited for", "trainwright", lambda options: stall_s(options, "trainwright")),
    ("trainwright, async_save", "trainwright", lambda options: stall_s(options, "trainwright", async_save=True)),
    ("transformers Trainer", "transformers", lambda options: stall_s(options, "transformers")),
]
RUNS: dict[str, dict[str, Any]] = {
    "no checkpoint": {"save_steps": 0},
    "at every step, async_save": {"save_steps": 1, "async_save": True},
    "at every step, waited for": {"save_steps": 1},
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both tables as numbers, in rounds A B C A B C, so that all meet the same disturbances."""
    stalls: dict[str, list[float]] = {}
    runs: dict[str, list[float]] = {name: [] for name in RUNS}
    rows = [row for row in STALLS if importlib.util.find_spec(row[1]) is not None]
    for name, package, _ in STALLS:
        if importlib.util.find_spec(package) is None:
            print(f"Left out: {name} (pip install {package} accelerate to have it measured)", file=sys.stderr)
    progress = Progress(options.rounds * (len(rows) + len(RUNS)))
    for number in range(1, options.rounds + 1):
        for name, _, run in rows:
            progress.say(f"{name}: stall, round {number} of {options.rounds}")
            stalls.setdefault(name, []).extend(run(options))
        for name, arguments in RUNS.items():
            progress.say(f"{name}: time of a run, round {number} of {options.rounds}")
            runs[name].append(run_s(options, **arguments))
    progress.end()
    return {"stalls_s": stalls, "runs_s": runs, "state_bytes": options.state_bytes}


# ------------------------------------------------------------------------------ the copy of the state, ours and torch's


def our_snapshot(weights: dict[str, Any], states: dict[str, Any], num_bytes: int) -> Callable[[], Any]:
    """As `async_save` makes it: both files into shared memory that is there already, and where they lie remembered."""
    from trainwright.checkpoint.shared_memory import Arena
    from trainwright.checkpoint.snapshot import Job, Snapshot

    arena, arrangements = Arena(num_bytes), {}

    def stage() -> None:
        arena.clear()
        snapshot = Snapshot(arena, Job("/staging", "/final", 1, 1, {}), None, arrangements)
        if not snapshot.add("tensors", "/staging/model.safetensors", weights, {}):
            raise AssertionError("the weights were not taken")
        if not snapshot.add("torch", "/staging/optimizer.pt", states):
            raise AssertionError("the optimizer's state was not taken")
        snapshot.finish()

    return stage


def torch_stager(is_async: bool) -> Callable[[dict[str, Any], dict[str, Any], int], Callable[[], Any]]:
    """torch's, with shared memory; `is_async`: on its own thread, and waited for, as the next update has to."""

    def made(weights: dict[str, Any], states: dict[str, Any], num_bytes: int) -> Callable[[], Any]:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        on_device = torch.cuda.is_available()
        stager = DefaultStager(StagingOptions(on_device, True, is_async, on_device))
        state = {"weights": weights, "optimizer": states}
        return lambda: stager.stage(state).result() if is_async else stager.stage(state)

    return made


def one_copy(weights: dict[str, Any], states: dict[str, Any], num_bytes: int) -> Callable[[], Any]:
    """The floor: one copy of as many bytes into memory that is there, by one thread."""
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    return lambda: target.copy_(source)


STAGERS: dict[str, Callable[[dict[str, Any], dict[str, Any], int], Callable[[], Any]]] = {
    "one copy of the same bytes": one_copy,
    "trainwright, snapshot": our_snapshot,
    "torch, DefaultStager on the run's thread": torch_stager(False),
    "torch, DefaultStager, asynchronous and waited for": torch_stager(True),
}


def measure_stagers(options: argparse.Namespace) -> dict[str, Any]:
    """Each stager on the same state: what its first copy costs and what it holds; then `rounds` copies, in turn."""
    weights, states = state_of(options)
    tensors = [*weights.values(), *(tensor for state in states["state"].values() for tensor in state.values())]
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    rows: dict[str, dict[str, Any]] = {}
    stages = {}
    for name, make in STAGERS.items():
        descriptors, shared_kib = len(os.listdir("/proc/self/fd")), _shared_kib()
        start = time.perf_counter()
        stages[name] = make(weights, states, num_bytes)
        made_s = time.perf_counter() - start
        rows[name] = {"made_s": made_s, "first_s": timed(stages[name]), "wall_s": [], "cpu_s": []}
        rows[name]["descriptors"] = len(os.listdir("/proc/self/fd")) - descriptors
        rows[name]["shared_mb"] = (_shared_kib() - shared_kib) * 1024 / 1e6
        stages[name]()
        counter = CallCounter()
        counter.start()
        stages[name]()
        counter.stop()
        rows[name]["python_calls"] = counter.num_python
    progress = Progress(options.rounds * len(rows))
    for number in range(1, options.rounds + 1):
        for name, stage in stages.items():
            progress.say(f"{name}: round {number} of {options.rounds}")
            cpu_s = time.process_time()
            rows[name]["wall_s"].append(timed(stage))
            rows[name]["cpu_s"].append(time.process_time() - cpu_s)
    progress.end()
    return {"state_bytes": num_bytes, "tensors": len(tensors), "stagers": rows}


def _shared_kib() -> int:
    """Shared memory that this process holds, as the system counts it (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssShmem:"))


def stager_table(rows: dict[str, dict[str, Any]]) -> str:
    """Ratios are medians over the rounds, of CPU time beside wall time where other work disturbs the second."""
    base = rows["one copy of the same bytes"]
    lines = [
        "| the state is copied by | made, first copy: ms | a later copy, ms: median (min to max) | wall, copies |"
        " CPU, copies | Python calls of the run's thread | descriptors | shared MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        wall, cpu = (
            statistics.median(one / other for one, other in zip(row[kind], base[kind])) for kind in ("wall_s", "cpu_s")
        )
        times = [1e3 * value for value in row["wall_s"]]
        lines.append(
            f"| {name} | {1e3 * row['made_s']:.1f}, {1e3 * row['first_s']:.1f} | {statistics.median(times):.1f} "
            f"({min(times):.1f} to {max(times):.1f}) | {wall:.2f} | {cpu:.2f} | {row['python_calls']:,} | "
            f"{row['descriptors']} | {row['shared_mb']:.0f} |"
        )
    return "\n".join(lines)


def stall_table(stalls: dict[str, list[float]]) -> str:
    base = statistics.median(stalls["one copy of the same bytes"])
    lines = ["| a save keeps a step waiting for | ms: median (min to max) | copies of the state |", "|---|---:|---:|"]
    for name, values in stalls.items():
        spread = f"{1e3 * statistics.median(values):.1f} ({1e3 * min(values):.1f} to {1e3 * max(values):.1f})"
        lines.append(f"| {name} | {spread} | {statistics.median(values) / base:.2f} |")
    return "\n".join(lines)


def run_table(runs: dict[str, list[float]]) -> str:
    """The overhead is the median of the rounds' ratios, so that a disturbance that lasts a whole round cancels."""
    lines = ["| checkpoints | ms per step: median | above none |", "|---|---:|---:|"]
    for name, values in runs.items():
        ratio = statistics.median(one / none for one, none in zip(values, runs["no checkpoint"]))
        lines.append(f"| {name} | {1e3 * statistics.median(values):.1f} | {100 * (ratio - 1):+.1f} % |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step (16)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (128)")
    parser.add_argument("--saves", type=int, default=4, help="saves per round and loop (4)")
    parser.add_argument("--settle", type=int, default=STEPS_BETWEEN_SAVES, help="steps between two saves (4)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each run with a save at every step (12)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, all loops in turn (3)")
    parser.add_argument("--stagers", action="store_true", help="compare copies of the state, nothing else (Linux)")
    parser.add_argument("--sharded", action="store_true", help="sharded saves, nothing else; under torchrun")
    parser.add_argument("--threads", type=int, default=1, help="threads torch may use (1: least disturbed)")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is an accelerator")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where checkpoints go (the system's scratch)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, versions and the machine to FILE")
    options = parser.parse_args(arguments)
    if options.steps < 6:
        parser.error(f"--steps {options.steps}: the first three are not measured, so it must be 6 or more")
    for name in ("saves", "rounds", "layers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: it must be 1 or more")
    if options.settle < 2:
        parser.error(f"--settle {options.settle}: without a step between two saves there is nothing to compare with")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    model = LanguageModel(options.layers, options.width, options.vocabulary, options.length)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if options.sharded:
        torch.distributed.init_process_group("gloo")
        sharded = measure_sharded(options)
        if torch.distributed.get_rank() == 0:
            print(f"{num_parameters:,} parameters, {sharded['state_bytes'] / 1e6:.0f} MB of state\n")
            print(sharded_table(sharded["rows"]))
        torch.distributed.destroy_process_group()
        return
    result = measure_stagers(options) if options.stagers else measure(options)
    about = {
        **environment(options),
        "parameters": num_parameters,
        "checkpoint_mb": round(result["state_bytes"] / 1e6),
        "free_gb": round(shutil.disk_usage(options.directory or tempfile.gettempdir()).free / 1e9),
        **{name: version(name) for name in ("transformers",) if importlib.util.find_spec(name)},
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), "\n")
    if options.stagers:
        print(f"{result['tensors']} tensors\n\n{stager_table(result['stagers'])}")
    else:
        print(stall_table(result["stalls_s"]), "\n")
        print(run_table(result["runs_s"]))
    if options.json is not None:
        options.json.write_text(json.dumps({**about, **result}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
