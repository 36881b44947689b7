"""Run the scenarios of a module of `tests/engines` in processes that torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
CHILD = TESTS / "engines" / "child.py"
MOST_WAIT_S = 420  # four times what the longest module takes on two cores


def run(module: str, folder: Path, num_processes: int) -> list[Any]:
    """What `scenarios(folder)` of `module` gives back in each of `num_processes` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    paths = [str(TESTS / "engines"), str(TESTS / "shared"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment["PYTHONWARNINGS"] = "ignore::FutureWarning"  # DeepSpeed's, one per collective
    done = subprocess.run(
        [*launcher, str(CHILD), module, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=MOST_WAIT_S,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(num_processes)]
