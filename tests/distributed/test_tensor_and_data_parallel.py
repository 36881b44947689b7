"""Four gloo processes, two groups of two: each group has one model, divided, and reads batches of its own (slow)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_tensor_parallel import BATCH, NUM_STEPS, largest_difference, make, result_of, samples

from blocks import num_processes
from conftest import launch

pytestmark = pytest.mark.slow

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"eval_strategy": "steps", "eval_steps": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": "all"},
    "saved": {"save_strategy": "steps", "save_steps": 3},
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(scenarios, tmp_path_factory.mktemp("four"), num_processes=4)


def scenarios(folder: Path) -> dict[str, Any]:
    each = BATCH // max(1, num_processes() // 2)
    sizes = {"per_device_train_batch_size": each, "per_device_eval_batch_size": each}
    found = {}
    for name, arguments in [*RUNS.items(), ("resumed", {})]:
        trainer = make(folder / name, **sizes, **arguments)
        trainer.train(resume_from_checkpoint=str(folder / "saved" / "checkpoint-3") if name == "resumed" else None)
        found[name] = {**result_of(trainer), "rows": torch.from_numpy(trainer.predict(samples(11)).predictions)}
    return found


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_two_groups_train_to_what_one_process_does(name: str, one: Any, four: list[Any]) -> None:
    for result in (each[name] for each in four):
        assert result["losses"] == pytest.approx(one[name]["losses"], abs=2e-6)
        assert result["norms"] == pytest.approx(one[name]["norms"], rel=1e-6)
        assert result["eval_losses"] == pytest.approx(one[name]["eval_losses"], abs=2e-6)
        assert largest_difference(result["weights"], one[name]["weights"]) < 2e-5


def test_batches_are_shared_out_over_groups(one: Any, four: list[Any]) -> None:
    seen = [each["plain"]["seen"] for each in four]
    assert seen[0] == seen[1] and seen[2] == seen[3] and len(seen[0]) == NUM_STEPS
    assert [[*first, *second] for first, second in zip(seen[0], seen[2])] == one["plain"]["seen"]
    tokens = [each["accumulated"]["last line"]["num_input_tokens_seen"] for each in (one, *four)]
    assert tokens == [NUM_STEPS * 2 * BATCH * 5] * 5
    assert all(each["plain"]["sizes"] == (2, BATCH, True) for each in four)


def test_each_sample_is_predicted_once(one: Any, four: list[Any]) -> None:
    for each in four:
        assert each["plain"]["rows"].shape == (11, 5, 32)
        assert largest_difference({"rows": each["plain"]["rows"]}, {"rows": one["plain"]["rows"]}) < 2e-5
