"""Two processes under torchrun, for the modules of this directory.

Owns: starting them, and what each of them gave back. Leaves to others: what they do, which is the function
`scenarios(folder)` of the module that asks; a module may call it in its own process, too, for what one process does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CHILD = Path(__file__).parent / "child.py"
MOST_WAIT_S = 600  # ten times what the longest module takes on two cores


def launch(module: str, path: Path, num_processes: int = 2) -> list[Any]:
    """What `scenarios(path)` of `module` gives back in each of so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(CHILD), module, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MOST_WAIT_S)
    assert done.returncode == 0, done.stderr[:6000]
    return [torch.load(path / f"results-{rank}.pt", weights_only=False) for rank in range(num_processes)]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes ran the module's scenarios."""
    path = tmp_path_factory.mktemp("two")
    launch(request.path.stem, path)
    return path


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Any]:
    """What the scenarios gave back in each process."""
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What they give back in one process."""
    return request.module.scenarios(tmp_path_factory.mktemp("one"))
