"""Two processes under torchrun, or as many as NUM_PROCESSES of the module says, for the modules of this directory.

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


def number(request: pytest.FixtureRequest) -> int:
    return int(getattr(request.module, "NUM_PROCESSES", 2))


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes ran the module's scenarios."""
    path = tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number(request)}"]
    command = [*launcher, str(CHILD), request.path.stem, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MOST_WAIT_S)
    assert done.returncode == 0, done.stderr[:6000]
    return path


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, folder: Path) -> list[Any]:
    """What the scenarios gave back in each process."""
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(number(request))]


@pytest.fixture(scope="module")
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What they give back in one process."""
    return request.module.scenarios(tmp_path_factory.mktemp("one"))
