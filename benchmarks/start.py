"""Measure how long it takes to begin: importing, the first step of a run, `trainwright --help`.

Owns: the programs that are started, the table. Every figure comes from fresh interpreters, in rounds in which all
programs take turns; the least of the rounds counts, because whatever disturbs a start makes it longer. CPU seconds are
user plus system time of the child and depend less on what else runs than wall seconds do.

    python benchmarks/start.py                  about half a minute
    python benchmarks/start.py --modules        which modules `from trainwright import Trainer` adds, and their cost
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from typing import Any

RUN = """
import tempfile, time
begin = time.perf_counter()
{imports}
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
    def forward(self, x, labels=None):
        out = self.linear(x)
        return {{"loss": (out - labels).pow(2).mean(), "logits": out}}
data = [{{"x": torch.ones(2), "labels": torch.ones(1)}}] * 8
with tempfile.TemporaryDirectory() as out:
    args = {package}.TrainingArguments(
        out, report_to="none", use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True
    )
    {package}.Trainer(Model(), args, train_dataset=data).train()
"""

# name -> (what a fresh interpreter runs, the row it is compared with, the package it needs)
PROGRAMS: dict[str, tuple[list[str], str | None, str]] = {
    "import torch": (["-c", "import torch"], None, "torch"),
    "from trainwright import Trainer": (
        ["-c", "import torch\nfrom trainwright import Trainer, TrainingArguments"],
        "import torch",
        "trainwright",
    ),
    "... and the first step of a toy run": (
        ["-c", RUN.format(imports="import torch, trainwright", package="trainwright")],
        "from trainwright import Trainer",
        "trainwright",
    ),
    "trainwright --help": (["-m", "trainwright", "--help"], None, "trainwright"),
    "from transformers import Trainer": (
        ["-c", "import torch\nfrom transformers import Trainer, TrainingArguments"],
        "import torch",
        "transformers",
    ),
    "... and the first step of a toy run (transformers)": (
        ["-c", RUN.format(imports="import torch, transformers", package="transformers")],
        "from transformers import Trainer",
        "transformers",
    ),
    "import lightning": (["-c", "import torch\nimport lightning"], "import torch", "lightning"),
}


def measure(program: list[str]) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of one start."""
    environment = {**os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what pip installs is compiled; a source tree is once, by itself
    before, start = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, env=environment)
    wall_s, after = time.perf_counter() - start, os.times()
    if done.returncode:
        sys.exit(f"{program} failed:\n{done.stderr}")
    cpu_s = after.children_user - before.children_user + after.children_system - before.children_system
    return wall_s, cpu_s


def rows(num_rounds: int) -> list[dict[str, Any]]:
    """One dict per program: the least wall and CPU seconds, and what that is above the program it builds on."""
    installed = {name: program for name, program in PROGRAMS.items() if importlib.util.find_spec(program[2])}
    least: dict[str, tuple[float, float]] = {}
    for _ in range(num_rounds):
        for name, (program, _, _) in installed.items():
            least[name] = tuple(map(min, measure(program), least.get(name, (float("inf"),) * 2)))  # type: ignore[assignment]
    result = []
    for name, (_, base, _) in PROGRAMS.items():
        row: dict[str, Any] = {"program": name}
        if name in least:
            row["wall_s"], row["cpu_s"] = least[name]
            if base is not None:
                row["above_wall_s"], row["above_cpu_s"] = (own - other for own, other in zip(least[name], least[base]))
        result.append(row)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["program"]) for row in rows)
    lines = [
        f"| {'a fresh interpreter runs':<{width}} | wall s | CPU s | above the line it builds on: wall s | CPU s  |",
        f"|{'-' * (width + 2)}|--------|-------|-------------------------------------|--------|",
    ]
    for row in rows:
        if "wall_s" not in row:
            lines.append(f"| {row['program']:<{width}} | not installed, not measured |")
            continue
        above = [f"{row[name]:+.3f}" if name in row else "" for name in ("above_wall_s", "above_cpu_s")]
        own = f"{row['wall_s']:6.3f} | {row['cpu_s']:5.2f}"
        lines.append(f"| {row['program']:<{width}} | {own} | {above[0]:>35} | {above[1]:>6} |")
    return "\n".join(lines)


def print_modules(num_shown: int) -> None:
    """The modules that `Trainer` adds to torch's, dearest first, with their own microseconds."""
    code = "import torch\nfrom trainwright import Trainer"
    text = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    ).stderr
    lines = re.findall(r"import time:\s+(\d+) \|\s+\d+ \| +(\S+)", text)
    after_torch = lines[[name for _, name in lines].index("torch") + 1 :]
    print(f"{len(after_torch)} modules, {sum(int(own) for own, _ in after_torch) / 1e6:.3f} s")
    for own, name in sorted(after_torch, key=lambda line: -int(line[0]))[:num_shown]:
        print(f"{int(own):8} us  {name}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="starts of each program (5)")
    parser.add_argument("--modules", action="store_true", help="list the modules that Trainer adds to torch's, and end")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: it must be at least 1")
    if options.modules:
        return print_modules(40)
    print(table(rows(options.rounds)))


if __name__ == "__main__":
    main()
