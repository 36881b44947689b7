"""Shards of four processes, some of which replicate (HSDP), and checkpoints that go from 2 to 1, 4 and 2 processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_fsdp import assert_equal_runs, assert_sharded, run
from test_sharded_checkpoints import PARTS, SAVING, assert_same_state, loaded, train

from blocks import num_processes
from conftest import launch

pytestmark = pytest.mark.slow

MESHES: dict[str, dict[str, Any]] = {
    "four parts": {"fsdp": "full_shard"},
    "two parts, twice": {"parallelism_config": {"dp_replicate_size": 2, "dp_shard_size": 2}},
    "two parts, on each of two nodes": {"fsdp": "hybrid_shard"},
    "two parts, on each of two nodes, not freed": {"fsdp": "hybrid_shard_zero2"},
}


def scenarios(folder: Path) -> dict[str, Any]:
    if num_processes() == 1:
        return {"plain": run(folder / "plain")}
    found: dict[str, Any] = {"loaded": {}}
    for other in sorted(folder.parent.glob("*/parts*/checkpoint-2")):
        name = f"{other.parents[1].name} {other.parent.name}"
        found["loaded"][name] = loaded(folder / f"loaded {name}", other)
    found["parts"] = train(folder / "parts", **SAVING, **PARTS)
    if num_processes() == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # as on two nodes
        for name, arguments in MESHES.items():
            found[name] = run(folder / name, **arguments)
        mesh = MESHES["two parts, twice"]
        found["parts, twice"] = train(folder / "parts, twice", **SAVING, **PARTS, **mesh)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What 2 processes found, then 4, then 2, each of which looks at the checkpoints of those before."""
    base = tmp_path_factory.mktemp("sizes")
    found = {}
    for name, size in (("first", 2), ("four", 4), ("last", 2)):
        (base / name).mkdir()
        found[name] = launch(scenarios, base / name, size)
    found["base"] = [base]
    return found


@pytest.mark.parametrize("name", list(MESHES))
def test_four_processes_train_to_what_one_does(runs: dict[str, list[Any]], one: Any, name: str) -> None:
    for rank in runs["four"]:
        assert_sharded(rank[name])
        assert_equal_runs(rank[name], one["plain"])
        num_parts = 4 if name == "four parts" else 2
        name_of_first, (_, num_here, num_whole) = next(iter(rank[name]["shares"].items()))
        assert num_here <= -(-num_whole // num_parts) + 16, name_of_first  # rows of 16 numbers are not cut


def test_checkpoints_in_parts_hold_the_same_for_any_number_of_processes(
    runs: dict[str, list[Any]], tmp_path: Path
) -> None:
    (base,) = runs["base"]
    assert set(runs["last"][0]["loaded"]) == {"first parts", "four parts", "four parts, twice"}
    for name, found in runs["last"][0]["loaded"].items():
        size, _, run_dir = name.partition(" ")
        alone = loaded(tmp_path / name, base / size / run_dir / "checkpoint-2")
        assert_same_state(found, alone)
        assert_same_state(runs["last"][1]["loaded"][name], alone)
        if size == "first":
            for rank in runs["four"]:
                assert_same_state(rank["loaded"][name], alone)
