"""Measure what a step costs where two processes train together: calls, collectives, CPU time.

Owns: the loops by hand, starting the processes, the table. Leaves to others: the work (`toy`), the trainers
(`contenders`), what is measured (`probes`).

    python benchmarks/scaling.py                      two processes, gloo, in about three minutes
    python benchmarks/scaling.py --rounds 0           counts only
    python benchmarks/scaling.py --memory             the peak of memory, FSDP2 beside DDP
    python benchmarks/scaling.py --lost               the time that a killed rank and one that hangs cost
    python benchmarks/scaling.py --calls-of "trainwright, DDP"     the calls it makes above the loop by hand

The loops take turns in the same two processes. Counts are those of rank 0, and exact; so is the number of collectives,
which the backend itself reports to torch's profiler. Times are CPU seconds of rank 0, all its threads, and include
waiting only as far as gloo spins. Of several rounds the least counts: what else a machine does adds to a time and never
takes from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler

import lost_ranks
import probes
import toy
from contenders import Contender, with_trainer

NUM_PROCESSES = 2
WARM_UP_STEPS = 20
FSDP2 = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}


class CollectiveCounter:
    """Collectives that the backend ran, by kind: also those that DistributedDataParallel starts from C++."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def start(self) -> None:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profile.start()

    def stop(self) -> None:
        self._profile.stop()
        for event in self._profile.events():
            if event.name.startswith(("gloo:", "nccl:")):
                self.kinds[event.name] += 1

    def result(self) -> dict[str, float]:
        return {"collectives": sum(self.kinds.values())}


def ddp_by_hand(collator: Any, num_steps: int, cpu: bool) -> None:
    """DistributedDataParallel, clipping, AdamW, one exchange and read of the mean loss per log line."""
    by_hand(collator, num_steps, lambda model: nn.parallel.DistributedDataParallel(model))


def fsdp_by_hand(collator: Any, num_steps: int, cpu: bool) -> None:
    """`fully_shard` of a model without repeated blocks, on a mesh of CPUs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    by_hand(collator, num_steps, lambda model: fully_shard(model, mesh=mesh))


def by_hand(collator: Any, num_steps: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(toy.ToyModel())
    optimizer, schedule = toy.optimizer_and_schedule(model, num_steps)
    parameters = list(model.parameters())
    data = toy.ToyData(2 * NUM_PROCESSES * num_steps * toy.BATCH_SIZE)
    loader = DataLoader(data, batch_size=toy.BATCH_SIZE, sampler=DistributedSampler(data), collate_fn=collator)
    losses: list[torch.Tensor] = []
    model.train()
    for step, batch in enumerate(loader, start=1):
        loss = model(**batch)["loss"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, toy.MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % toy.LOGGING_STEPS == 0:
            mean = torch.stack(losses).mean()
            distributed.all_reduce(mean)
            print(step, mean.item() / NUM_PROCESSES, float(norm))
            losses.clear()
        if step == num_steps:
            return


CONTENDERS = [
    Contender("DDP by hand", "torch", ddp_by_hand, variant="DDP"),
    Contender("transformers, DDP", "transformers", with_trainer("transformers"), variant="DDP"),
    Contender("trainwright, DDP", "trainwright", with_trainer("trainwright"), variant="DDP"),
    Contender("fully_shard by hand", "torch", fsdp_by_hand, variant="FSDP2"),
    # transformers trains DDP without a word where it is asked for FSDP on a CPU: nothing to compare with.
    Contender("trainwright, FSDP2", "trainwright", with_trainer("trainwright", **FSDP2), variant="FSDP2"),
]
PROBES: dict[str, Callable[[], Any]] = {
    "calls": probes.CallCounter,
    "functions": lambda: probes.CallCounter(by_function=True),
    "collectives": CollectiveCounter,
    "time": probes.UndisturbedStopwatch,
}


def probe_run(contender: Contender, kind: str, num_steps: int) -> Any:
    """Run one loop in all processes; returns the probe of this one, which watched `num_steps` steps."""
    probe = PROBES[kind]()
    collator = toy.MeasuringCollator(WARM_UP_STEPS, WARM_UP_STEPS + num_steps, start=probe.start, stop=probe.stop)
    with probes.silenced(still=kind != "time"):
        contender.run(collator, WARM_UP_STEPS + num_steps + 2, True)
    distributed.barrier()
    return probe


def measure(options: argparse.Namespace) -> None:
    """In each process: every loop in turn; rank 0 writes what it found."""
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    chosen = [
        row
        for row in CONTENDERS
        if row.is_installed and (not options.only or any(part in row.name for part in options.only))
    ]
    found: list[dict[str, Any]] = []
    for contender in chosen:
        result = {"loop": contender.name, "version": contender.version, "variant": contender.variant, "cpu_us": []}
        for kind in ("calls", "collectives"):
            counted = probe_run(contender, kind, options.counted).result()
            result |= {name: value / options.counted for name, value in counted.items()}
        found.append(result)
    for _ in range(options.rounds):
        for contender, result in zip(chosen, found):
            result["cpu_us"].append(1e6 * probe_run(contender, "time", options.steps).result()["cpu_s"] / options.steps)
    if options.calls_of:
        for contender in chosen:
            if options.calls_of in contender.name:
                probe = probe_run(contender, "functions", options.counted)
                by_hand_of = next(row for row in CONTENDERS if row.variant == contender.variant)
                bare = probe_run(by_hand_of, "functions", options.counted)
                if distributed.get_rank() == 0:
                    _print_calls(contender.name, probe.python_calls - bare.python_calls, options.counted)
    if distributed.get_rank() == 0:
        Path(options.into).write_text(json.dumps(found))
    distributed.destroy_process_group()


def _print_calls(name: str, calls: Counter[str], num_steps: int) -> None:
    print(f"\nPython calls of {name} above the loop by hand, per step:")
    for function, count in calls.most_common(40):
        print(f"  {count / num_steps:8.2f}  {function}")


class Blocks(nn.Module):
    """`NUM_BLOCKS` equal blocks of 4 x `WIDTH`^2 weights: 134 million, 537 MB in float32."""

    NUM_BLOCKS, WIDTH = 8, 2048

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        def block() -> nn.Module:
            return nn.Sequential(
                nn.Linear(self.WIDTH, 2 * self.WIDTH), nn.Tanh(), nn.Linear(2 * self.WIDTH, self.WIDTH)
            )

        self.blocks = nn.ModuleList(block() for _ in range(self.NUM_BLOCKS))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        for one in self.blocks:
            x = x + one(x)  # (batch, WIDTH)
        return {"loss": ((x - labels) ** 2).mean()}


class BlockData(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sixteen samples."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.full((Blocks.WIDTH,), index / 16)
        return {"x": x, "labels": -x}


def peak_of_training(engine: str) -> float:
    """Bytes of this process at its peak in three steps, above those that were resident before the model was made."""
    from trainwright import Trainer, TrainingArguments

    more: dict[str, Any] = FSDP2 if engine == "FSDP2" else {}
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, max_steps=3, per_device_train_batch_size=1, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, **more,
        )  # fmt: skip
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _resident("VmHWM")
        Trainer(Blocks(), arguments, train_dataset=BlockData()).train()
        return _resident("VmHWM") - before


def _resident(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return float(line.split()[1]) * 1024


def print_memory(peaks: dict[str, float]) -> None:
    print("\nPeak of a process in three steps, weights, gradients and AdamW of 134 million parameters:")
    for engine, peak in peaks.items():
        print(f"  {engine:<6} {peak / 2**20:8,.0f} MiB  {peak / peaks['DDP']:.2f} x DDP")


def print_table(found: list[dict[str, Any]]) -> None:
    header = [
        "per step",
        "version",
        "Python calls (above)",
        "C calls (above)",
        "collectives (above)",
        "CPU us: least (median)",
        "ratio",
    ]
    rows = []
    for result in found:
        bare = next((other for other in found if other["variant"] == result["variant"]), result)
        counts = [f"{result[name]:.0f} ({result[name] - bare[name]:+.0f})" for name in ("python_calls", "c_calls")] + [
            f"{result['collectives']:.2f} ({result['collectives'] - bare['collectives']:+.2f})"
        ]
        times = ["", ""]
        if result["cpu_us"]:
            ratio = min(result["cpu_us"]) / min(bare["cpu_us"])
            times = [f"{min(result['cpu_us']):.0f} ({statistics.median(result['cpu_us']):.0f})", f"{ratio:.2f}"]
        rows.append([result["loop"], result["version"], *counts, *times])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="in which the loops take turns to be timed (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of a timed run (%(default)s)")
    parser.add_argument("--counted", type=int, default=100, help="steps whose calls are counted (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], help="loops whose name has one of these in it")
    parser.add_argument("--calls-of", help="list the calls of the loops whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--memory", action="store_true", help="the peak of memory with DDP and with FSDP2 (Linux), only"
    )
    parser.add_argument("--lost", action="store_true", help="the time that a rank costs that is killed or hangs, only")
    parser.add_argument("--into", help=argparse.SUPPRESS)  # in the processes
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        peak = peak_of_training(options.engine)
        if distributed.get_rank() == 0:
            Path(options.into).write_text(json.dumps(peak))
        return
    if options.into:
        measure(options)
        return
    if options.memory:
        print_memory({engine: started(["--engine", engine]) for engine in ("DDP", "FSDP2")})
        return
    if options.lost:
        print(lost_ranks.table(options.rounds))
        return
    found = started(sys.argv[1:])
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def started(arguments: list[str]) -> Any:
    """What rank 0 of two processes found, which run this file with `arguments`."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
        command += [__file__, *arguments, "--into", str(into)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run(command, env=environment, check=True, timeout=3600)
        return json.loads(into.read_text())


if __name__ == "__main__":
    main()
