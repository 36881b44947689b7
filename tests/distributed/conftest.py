"""Several processes with a process group, for the modules of this directory.

Owns: starting them, and what each of them gave back. Leaves to others: what they do, which is the function
`scenarios(folder)` of the module that asks; a module may call it in its own process, too, for what one process does.
They are forks of this process, which need not import torch again; launchers are tested in `test_launchers.py`,
`test_accelerate_launch.py` and `test_lost_ranks.py`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import start

MOST_WAIT_S = 600  # ten times what the longest module takes on two cores


def launch(scenarios: Callable[[Path], Any], path: Path, num_processes: int = 2) -> list[Any]:
    """What `scenarios(path)` gives back in each of so many processes."""

    def run(rank: int) -> None:
        torch.save(scenarios(path), path / f"results-{rank}.pt")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "GROUP_RANK": "0"}
    sizes = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    ranks = [{**group, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    for ended in start(ranks, run, path / "processes", limit_s=MOST_WAIT_S):
        assert ended.code == 0, ended.error + ended.output[-6000:]
    return [torch.load(path / f"results-{rank}.pt", weights_only=False) for rank in range(num_processes)]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes ran the module's scenarios."""
    path = tmp_path_factory.mktemp("two")
    launch(request.module.scenarios, path)
    return path


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Any]:
    """What the scenarios gave back in each process."""
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What they give back in one process."""
    return request.module.scenarios(tmp_path_factory.mktemp("one"))
