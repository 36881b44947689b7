"""Run each program of this folder on the reference's Trainer and, unchanged, on ours; print what both did.

    python downstream/compare.py                      # all programs
    python downstream/compare.py trl_sft              # one of them

A program is run twice in fresh processes: `python program.py` and `trainwright run program.py`. Its losses must agree
at every step to 1e-5 of the largest, also those of the run that went on from a checkpoint. Which engine a run was on is
seen by what it wrote: ours adds manifest.json to a checkpoint. Exit code 1 where anything differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ENGINES = {"reference": [], "trainwright": ["-m", "trainwright", "run"]}
TOLERANCE = 1e-5


def run(program: str, engine: str, directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The losses that `program` reported; raises SystemExit with its output where it failed."""
    directory.mkdir()
    command = [sys.executable, *ENGINES[engine], str(HERE / f"{program}.py"), str(directory), str(directory / "losses")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} failed on {engine}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    is_ours = any(directory.glob("checkpoint-*/manifest.json"))
    if is_ours != (engine == "trainwright"):
        raise SystemExit(f"{program} was to run on {engine}, and ran on the other engine.")
    return json.loads((directory / "losses").read_text(encoding="utf-8"))


def largest_difference(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> float:
    """Of two loss curves, as a share of the largest loss; infinite where they do not have the same steps."""
    if not one or [step for step, _ in one] != [step for step, _ in other]:
        return float("inf")
    return max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True)) / max(abs(a) for _, a in one)


def main() -> int:
    programs = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*_*.py"))
    agree = True
    row = "{:<24}{:>7}{:>14}{:>14}{:>16}{:>16}"
    print(row.format("program", "steps", "first loss", "last loss", "difference", "after a resume"))
    for program in programs:
        with tempfile.TemporaryDirectory() as directory:
            theirs, ours = (run(program, engine, Path(directory) / engine) for engine in ENGINES)
        differences = [largest_difference(theirs[key], ours[key]) for key in ("losses", "resumed")]
        agree = agree and max(differences) <= TOLERANCE
        curve = ours["losses"]
        numbers = (f"{curve[0][1]:.6f}", f"{curve[-1][1]:.6f}", *(f"{value:.1e}" for value in differences))
        print(row.format(program, len(curve), *numbers), flush=True)
    print(f"all within {TOLERANCE:.0e}" if agree else f"SOME DIFFER by more than {TOLERANCE:.0e}")
    return int(not agree)


if __name__ == "__main__":
    raise SystemExit(main())
