"""What a step of two processes costs above a loop by hand: calls and collectives, as `benchmarks/scaling.py` counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
MOST_PYTHON_CALLS, MOST_C_CALLS = 60, 40  # per step; a collective costs more than all of them


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Loop -> its counts per step."""
    path = tmp_path_factory.mktemp("counts") / "counts.json"
    options = ["--rounds", "0", "--counted", "20", "--json", str(path), "--only", "by hand", "trainwright"]
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return {row["loop"]: row for row in json.loads(path.read_text())}


@pytest.mark.parametrize(("ours", "by_hand"), [("DDP", "DDP by hand"), ("FSDP2", "fully_shard by hand")])
def test_a_step_over_two_processes_makes_few_calls_and_no_collective_above_a_loop_by_hand(
    counts: dict[str, Any], ours: str, by_hand: str
) -> None:
    row, bare = counts[f"trainwright, {ours}"], counts[by_hand]
    assert row["python_calls"] - bare["python_calls"] <= MOST_PYTHON_CALLS
    assert row["c_calls"] - bare["c_calls"] <= MOST_C_CALLS
    assert row["collectives"] == bare["collectives"]
