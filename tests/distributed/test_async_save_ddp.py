"""Asynchronous saves of two processes: one writer, one checkpoint, and both hear of it after the same step."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_ddp import LineData, LineModel, make_trainer, result_of

from trainwright import TrainerCallback
from trainwright.checkpoint import frozen
from trainwright.checkpoint.asynchronous import AsyncSaves
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.weights import load_weights

SAVING = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 4}  # 12 steps
GROUP_STEPS = [3, 6, 9, 12]


class Heard(TrainerCallback):
    def __init__(self) -> None:
        self.saves: list[tuple[int, int, bool]] = []
        self.step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, checkpoint_dir: str, **kwargs: Any) -> None:
        self.saves.append((state.global_step, self.step, problems(checkpoint_dir) == []))


def train(folder: Path, resume: Any = None, **arguments: Any) -> dict[str, Any]:
    heard = Heard()
    model = LineModel(dropout=0.3)
    if folder.name.startswith("frozen"):
        model.register_parameter("before", torch.nn.Parameter(torch.randn(64), requires_grad=False))
        frozen.LEAST_BYTES = 1
    trainer = make_trainer(folder, model, LineData(40), **(SAVING | arguments))
    trainer.add_callback(heard)
    trainer.train(resume_from_checkpoint=resume)
    return {**result_of(trainer), "saves": heard.saves, "failures": trainer._run.saves.failures.num_failures}


def failing_once(folder: Path) -> dict[str, Any]:
    """As if the disk had been full for the second save: only process 0 sees the answer of its writer."""
    result = AsyncSaves.result

    def full(self: AsyncSaves) -> None:
        result(self)
        if self.num_saves == 2 and self._is_main:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    AsyncSaves.result = full  # type: ignore[method-assign]
    try:
        return train(folder, async_save=True)
    finally:
        AsyncSaves.result = result  # type: ignore[method-assign]


def scenarios(target: Path) -> dict[str, Any]:
    return {
        "waited": train(target / "waited"),
        "beside": train(target / "beside", async_save=True),
        "resumed": train(target / "resumed", resume=str(target / "beside" / "checkpoint-6"), async_save=True),
        "full": failing_once(target / "full"),
        "frozen": train(target / "frozen", num_train_epochs=2),
        "frozen beside": train(target / "frozen beside", num_train_epochs=2, async_save=True),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


def test_the_checkpoint_holds_the_files_of_both_processes(folder: Path) -> None:
    for step in GROUP_STEPS:
        beside, waited = (folder / name / f"checkpoint-{step}" for name in ("beside", "waited"))
        assert problems(str(beside)) == []
        assert sorted(os.listdir(beside)) == sorted(os.listdir(waited))
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(beside))
        for name in ("model.safetensors", "optimizer.pt", "rng_state_1.pth", "scheduler.pt"):
            assert (beside / name).read_bytes() == (waited / name).read_bytes()
    assert sorted(os.listdir(folder / "beside")) == [
        *sorted(f"checkpoint-{step}" for step in GROUP_STEPS),
        "metrics.jsonl",
        "training_report.html",
    ]


def test_both_hear_of_each_save_after_the_same_step_when_it_is_there(two: list[dict[str, Any]]) -> None:
    assert two[0]["beside"]["saves"] == two[1]["beside"]["saves"]
    assert [step for step, _, _ in two[0]["beside"]["saves"]] == GROUP_STEPS
    assert all(is_there for _, _, is_there in two[0]["beside"]["saves"])


def test_the_run_and_its_resume_are_bit_exact(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["beside"]["losses"] == rank["waited"]["losses"]
        assert same(rank["beside"], rank["waited"]) and same(rank["resumed"], rank["waited"])
        assert rank["resumed"]["seen"] == rank["waited"]["seen"][-len(rank["resumed"]["seen"]) :]


@pytest.mark.parametrize("name", ["frozen", "frozen beside"])
def test_frozen_weights_are_written_once(folder: Path, two: list[dict[str, Any]], name: str) -> None:
    first, second = (folder / name / f"checkpoint-{step}" for step in (3, 6))
    assert problems(str(first)) == problems(str(second)) == []
    assert (second / "model-00001-of-00002.safetensors").samefile(first / "model-00001-of-00002.safetensors")
    model = LineModel()
    model.register_parameter("before", torch.nn.Parameter(torch.zeros(64), requires_grad=False))
    load_weights(model, second, strict=True)
    assert all(torch.equal(value, two[1][name]["weights"][key]) for key, value in model.state_dict().items())


def test_a_save_that_fails_in_one_process_is_a_failure_in_both(folder: Path, two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert [step for step, _, _ in rank["full"]["saves"]] == [3, 9, 12]
        assert rank["full"]["failures"] == 0  # forgotten after the next good one
