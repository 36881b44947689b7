"""Measure what training loops cost per step: calls, tensor operations, reads from the device, time.

Owns: the order of measurements, the table, the JSON. Leaves to others: the loops (`contenders`), the work they do
(`toy`), what is measured (`probes`).

    python benchmarks/step_overhead.py                                    the table, in about two minutes
    python benchmarks/step_overhead.py --older .transformers-4.55         with an older transformers as one more row
    python benchmarks/step_overhead.py --calls-of trainwright             the calls it makes above the bare loop
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import probes
import toy
from contenders import CONTENDERS, Contender

WARM_UP_STEPS = 20
Measure = Callable[[str, int], dict[str, float]]  # (probe, steps) -> its result per step
PROBES: dict[str, Callable[[], Any]] = {
    "calls": probes.CallCounter,
    "functions": lambda: probes.CallCounter(by_function=True),
    "ops": probes.OpCounter,
    "time": probes.Stopwatch,
}


def probe_run(contender: Contender, kind: str, num_steps: int, cpu: bool) -> Any:
    """Run one loop and return the probe that watched `num_steps` of its steps, after a few to warm up."""
    probe, size = PROBES[kind](), contender.micro_batches
    collator = toy.MeasuringCollator(
        WARM_UP_STEPS * size, (WARM_UP_STEPS + num_steps) * size, start=probe.start, stop=probe.stop
    )
    with probes.silenced(still=kind != "time"):
        contender.run(collator, WARM_UP_STEPS + num_steps + 2, cpu)  # 2: some loops fetch a batch ahead
    return probe


def measure_here(contender: Contender, cpu: bool) -> Measure:
    def measure(kind: str, num_steps: int) -> dict[str, float]:
        result = probe_run(contender, kind, num_steps, cpu).result()
        return {name: value / num_steps for name, value in result.items()}

    return measure


class OtherProcess:
    """Measures in a process with another search path, kept alive so that its rounds lie between those of the others."""

    def __init__(self, directory: Path, flags: list[str]) -> None:
        search_path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search_path},
            text=True,
        )
        self.versions = self.ask(None)

    def ask(self, question: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("The process of --older ended; its error is above.")
        return json.loads(answer)

    def measure(self, name: str) -> Measure:
        return lambda kind, num_steps: self.ask([name, kind, num_steps])


def serve(cpu: bool) -> None:
    """Answer an `OtherProcess`, one line for a line, until it closes the pipe."""
    known = {contender.name: contender for contender in CONTENDERS}
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    for line in sys.stdin:
        question = json.loads(line)
        if question is None:
            answer: Any = {name: contender.version for name, contender in known.items() if contender.is_installed}
        else:
            name, kind, num_steps = question
            answer = measure_here(known[name], cpu)(kind, num_steps)
        answers.write(json.dumps(answer) + "\n")


def chosen_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per loop that will be measured; says which ones are left out and why."""
    rows: list[dict[str, Any]] = []
    for contender in CONTENDERS:
        if options.only and not any(wanted in contender.name for wanted in options.only):
            continue
        if not contender.is_installed:
            package = contender.package
            print(f"Left out: {contender.name} (pip install {package} to have it measured)", file=sys.stderr)
            continue
        rows.append(_row(contender, contender.version, measure_here(contender, options.cpu)))
    if options.older is not None:
        other = OtherProcess(options.older, ["--cpu"] * options.cpu + ["--threads", str(options.threads)])
        for contender in CONTENDERS:
            if contender.package == "transformers":
                rows.append(_row(contender, other.versions[contender.name], other.measure(contender.name)))
    return sorted(rows, key=lambda row: (*_work(row), "bare" not in row["loop"]))


def _work(row: dict[str, Any]) -> tuple[str, int]:
    """What rows must have in common to be compared."""
    return row["variant"], row["micro_batches"]


def _row(contender: Contender, version: str, measure: Measure) -> dict[str, Any]:
    return {
        "loop": contender.name,
        "version": version,
        "micro_batches": contender.micro_batches,
        "variant": contender.variant,
        "measure": measure,
        "rounds": [],
    }


def measure_all(rows: list[dict[str, Any]], num_steps: int, num_rounds: int) -> None:
    """Counts once, because they are exact; times in rounds A B C A B C, so that all meet the same disturbances."""
    progress = Progress(len(rows) * (3 + num_rounds))
    for row in rows:  # importing some of them changes functions of torch's for all that are measured after it
        progress.say(f"{row['loop']} {row['version']}: once, to import it")
        row["measure"]("time", toy.LOGGING_STEPS)
    for row in rows:
        for kind in ("calls", "ops"):
            progress.say(f"{row['loop']} {row['version']}: counting")
            row.update(row["measure"](kind, toy.LOGGING_STEPS))
    for number in range(1, num_rounds + 1):
        for row in rows:
            progress.say(f"{row['loop']} {row['version']}: time, round {number} of {num_rounds}")
            row["rounds"].append(row["measure"]("time", num_steps))
    progress.end()


class Progress:
    """One line on stderr. Not tqdm, because the bars that are measured would be nested in it and draw differently."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()

    def say(self, what: str) -> None:
        left_s = (time.monotonic() - self.start) / max(1, self.done) * (self.total - self.done)
        left = f", about {left_s:.0f} s left" if self.done else ""
        print(f"\r\033[K[{self.done}/{self.total}{left}] {what}", end="", file=sys.stderr, flush=True)
        self.done += 1

    def end(self) -> None:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def summarise(rows: list[dict[str, Any]]) -> None:
    """Put medians, extremes and the comparison with the bare loop into each row, in place.

    The ratio is the median of the rounds' ratios, so that a disturbance which lasts a whole round cancels.
    """
    bare = {_work(row): row for row in rows if row["loop"].startswith("bare")}
    for row in rows:
        base = bare.get(_work(row))
        if base is not None:
            for name in ("python_calls", "c_calls"):
                row[f"{name}_above_bare"] = row[name] - base[name]
        if not row["rounds"]:
            continue
        for name in ("wall", "cpu"):
            values_us = [1e6 * one[f"{name}_s"] for one in row["rounds"]]
            row[f"{name}_us"] = {"median": statistics.median(values_us), "min": min(values_us), "max": max(values_us)}
        if base is not None:
            ratios = [one["cpu_s"] / other["cpu_s"] for one, other in zip(row["rounds"], base["rounds"])]
            row["cpu_ratio_to_bare"] = statistics.median(ratios)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as an aligned Markdown table, so that it reads in a terminal and pastes into a document."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "per step": lambda row: row["loop"],
        "version": lambda row: row["version"],
        "Python calls (above bare)": lambda row: _calls(row, "python_calls"),
        "C calls (above bare)": lambda row: _calls(row, "c_calls"),
        "aten ops": lambda row: f"{row['aten_ops']:.0f}",
        "host syncs": lambda row: f"{row['host_syncs']:.2f}",
        "wall us: median (min to max)": lambda row: _spread(row.get("wall_us")),
        "CPU us: median (min to max)": lambda row: _spread(row.get("cpu_us")),
        "CPU, ratio to bare": lambda row: f"{row['cpu_ratio_to_bare']:.2f}" if "cpu_ratio_to_bare" in row else "",
    }
    cells = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    lines = ["| " + " | ".join(_padded(line, widths)) + " |" for line in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _calls(row: dict[str, Any], name: str) -> str:
    above = f" ({row[f'{name}_above_bare']:+.0f})" if f"{name}_above_bare" in row else ""
    return f"{row[name]:.0f}{above}"


def _padded(line: list[str], widths: list[int]) -> list[str]:
    return [
        cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(line, widths))
    ]


def _spread(values_us: dict[str, float] | None) -> str:
    return f"{values_us['median']:.0f} ({values_us['min']:.0f} to {values_us['max']:.0f})" if values_us else ""


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    device = None if options.cpu else torch.accelerator.current_accelerator(check_available=True)
    name = torch.cuda.get_device_name() if device is not None and device.type == "cuda" else str(device or "cpu")
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "device": name,
        "threads": options.threads,
        "steps_per_round": options.steps,
        "rounds": options.rounds,
    }


def print_calls(name: str, cpu: bool) -> None:
    """Which functions a loop calls more, or less, often per step than the bare loop with as many micro-batches."""
    known = {contender.name: contender for contender in CONTENDERS}
    if name not in known:
        sys.exit(f"--calls-of {name!r} is not one of the loops: {', '.join(known)}.")
    work = known[name].variant, known[name].micro_batches
    bare = next(one for one in CONTENDERS if one.package == "torch" and (one.variant, one.micro_batches) == work)
    ours, theirs = (probe_run(one, "functions", toy.LOGGING_STEPS, cpu) for one in (known[name], bare))
    for kind in ("python_calls", "c_calls"):
        calls, base = getattr(ours, kind), getattr(theirs, kind)
        differences = {key: (calls[key] - base[key]) / toy.LOGGING_STEPS for key in {*calls, *base}}
        print(f"\n{sum(differences.values()):+.2f} {kind.replace('_', ' ')} per step against the bare loop")
        for key, difference in sorted(differences.items(), key=lambda item: (-abs(item[1]), item[0])):
            if abs(difference) >= 0.05:
                print(f"{difference:+8.2f}  {key}")


def multiple_of_log_interval(text: str) -> int:
    number = int(text)
    if number < 1 or number % toy.LOGGING_STEPS:
        raise argparse.ArgumentTypeError(
            f"{number} is not a multiple of {toy.LOGGING_STEPS}, so loops would differ in how many log lines they wrote"
        )
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Counts are exact and do not depend on the machine's load. Times do: run on a quiet machine, and "
        "compare ratios rather than microseconds. What the loops print goes to /dev/null: the time a terminal takes to "
        "show it is not measured.",
    )
    parser.add_argument("--steps", type=multiple_of_log_interval, default=300, help="steps timed per round (300)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing, all loops in turn (9); 0: counts only")
    parser.add_argument("--threads", type=int, default=1, help="threads torch may use (1: least disturbed)")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is an accelerator")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only loops whose name contains one of these texts")
    parser.add_argument("--older", type=Path, metavar="DIR", help="also measure the transformers installed in DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, versions and the machine to FILE")
    parser.add_argument(
        "--calls-of", metavar="LOOP", help="list the calls that LOOP makes above the bare loop, and end"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rounds < 0:
        parser.error(f"--rounds {options.rounds}: it must be 0 (counts only) or more")
    if options.older is not None and not (options.older / "transformers").is_dir():
        parser.error(
            f"--older {options.older}: there is no transformers in it (pip install --target DIR transformers==X)"
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.serve:
        return serve(options.cpu)
    if options.calls_of is not None:
        return print_calls(options.calls_of, options.cpu)
    rows = chosen_rows(options)
    if not rows:
        sys.exit(f"No loop has {' or '.join(options.only)} in its name: {', '.join(one.name for one in CONTENDERS)}.")
    measure_all(rows, options.steps, options.rounds)
    summarise(rows)
    about = environment(options)
    print(", ".join(f"{name} {value}" for name, value in about.items()), "\n")
    print(table(rows))
    if options.json is not None:
        numbers = [{name: value for name, value in row.items() if name != "measure"} for row in rows]
        options.json.write_text(json.dumps({**about, "loops": numbers}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
