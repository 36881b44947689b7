"""A process that is killed while DeepSpeed writes its parts: the checkpoint before is whole, and the run resumes."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate.data_loader  # noqa: F401  imported before the forks, with what it imports
import datasets  # noqa: F401
import pytest
import torch

from forked import Ended, start
from regression import make, result_of, zero
from trainwright.checkpoint.layout import sort_checkpoints
from trainwright.checkpoint.manifest import problems
from trainwright.interop.optional import is_installed
from trainwright.parallel import deepspeed_checkpoint

if is_installed("deepspeed"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # type: ignore[import-not-found,unused-ignore]  # noqa: F401

KILLED_STEP = 4


def ranks() -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{"RANK": rank, "LOCAL_RANK": rank, **place} for rank in "01"]


def killed_at(number: int) -> Any:
    """In place of `deepspeed_checkpoint.save`: the process dies in the `number`-th file of the checkpoint of
    KILLED_STEP, of which half is written."""
    save, write = deepspeed_checkpoint.save, torch.save
    left = number

    def torn(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal left
        left -= 1
        write(value, path, *args, **kwargs)
        if left == 0:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def save_or_die(engine: Any, directory: str, step: int) -> None:
        with pytest.MonkeyPatch.context() as patches:
            if step == KILLED_STEP:
                patches.setattr(torch, "save", torn)
            save(engine, directory, step)

    return save_or_die


def run(folder: Path, stage: int, name: str, victim: int | None = None, number: int = 0) -> list[Ended]:
    def action(rank: int) -> dict[str, Any]:
        if rank == victim:
            deepspeed_checkpoint.save = killed_at(number)
        trainer = make(folder, zero(stage), max_steps=5, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint="auto")
        return {**result_of(trainer), "resumed": len(trainer.state.log_history)}

    return start(ranks(), action, folder.parent / f"{folder.name}-{name}")


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """With the engine, though the process that is forked is alone."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("ALONE", "1")
        yield


@pytest.fixture(scope="module", params=[2, 3])
def stage(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def whole(stage: int, tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    ended = run(tmp_path_factory.mktemp("whole") / "out", stage, "first")
    assert [one.code for one in ended] == [0, 0], ended
    return ended


# Process 0 writes the model's states before its part of the optimizer's; with stage 3 process 1 does, too.
@pytest.mark.parametrize(("victim", "number"), [(0, 2), (1, 1)])
def test_a_process_that_is_killed_in_a_save_costs_that_save_only(
    tmp_path: Path, stage: int, whole: list[Ended], victim: int, number: int
) -> None:
    codes = [one.code for one in run(tmp_path / "cut", stage, "first", victim, number)]
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    left = sort_checkpoints(tmp_path / "cut")
    assert [os.path.basename(path) for path in left] == ["checkpoint-2"] and problems(left[0]) == []

    again = run(tmp_path / "cut", stage, "again")
    assert [one.code for one in again] == [0, 0], again
    for one, other in zip(again, whole, strict=True):
        assert one.result["losses"] == other.result["losses"]
        for name, weight in other.result["weights"].items():
            assert torch.equal(one.result["weights"][name], weight)
    assert [problems(path) for path in sort_checkpoints(tmp_path / "cut")] == [[], [], []]
    assert not [name for name in os.listdir(tmp_path / "cut") if "staged" in name]
