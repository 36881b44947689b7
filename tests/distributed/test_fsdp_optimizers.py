"""The column "sharded" of the registry: each such optimizer steps shards as one process steps whole weights."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_fsdp import NUM_STEPS, assert_sharded, run

from trainwright import TrainingArguments
from trainwright.optim.registry import ROWS
from trainwright.parallel.fsdp import check_arguments

MODULES = {"torch-optimi": "optimi"}
SHARDED = [
    name
    for name, row in ROWS.items()
    if row.sharded and (row.package is None or find_spec(MODULES.get(row.package, row.package)) is not None)
]
OTHERS = [name for name, row in ROWS.items() if not row.sharded]
# How close, relative in losses and absolute in weights. RMSprop divides by the root of small squares, and Muon's
# Newton-Schulz iteration is in bfloat16, where another order of sums is another rounding.
CLOSE = {"rmsprop": (5e-6, 5e-5), "muon": (1e-4, 2e-3)}


def scenarios(folder: Path) -> dict[str, Any]:
    found = {}
    for name in SHARDED:
        arguments: dict[str, Any] = {"optim": name, "save_strategy": "steps", "save_steps": NUM_STEPS // 2}
        if name.startswith("schedule_free"):
            arguments["lr_scheduler_type"] = "constant"
        whole = run(folder / name, **arguments)
        checkpoint = str(folder / name / f"checkpoint-{NUM_STEPS // 2}")
        found[name] = whole, run(folder / f"{name} resumed", resume=checkpoint, **arguments)
    return found


@pytest.mark.parametrize("name", SHARDED)
def test_shards_are_stepped_as_whole_weights_are(two: Any, one: Any, name: str) -> None:
    of_losses, of_weights = CLOSE.get(name, (2e-6, 2e-5))
    expected, _ = one[name]
    for rank in two:
        found, _ = rank[name]
        assert_sharded(found)
        assert found["losses"] == pytest.approx(expected["losses"], rel=of_losses)
        for key, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][key], weight, rtol=0, atol=of_weights)


@pytest.mark.parametrize("name", SHARDED)
def test_its_state_is_saved_and_restored_bit_by_bit(two: Any, name: str) -> None:
    for rank in two:
        whole, resumed = rank[name]
        assert resumed["losses"] == whole["losses"]
        assert all(torch.equal(resumed["weights"][key], weight) for key, weight in whole["weights"].items())


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_optimizer_is_refused_by_name(name: str, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, fsdp="full_shard")
    args.optim = name
    with pytest.raises(ValueError, match=rf"optim='{name}' cannot be used with fsdp.*'adamw_torch'"):
        check_arguments(args)
