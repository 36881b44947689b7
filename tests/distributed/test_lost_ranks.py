"""A rank that dies, hangs or fails ends all of them and is named once; what is restarted resumes without user code."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accelerate.data_loader  # noqa: F401  imported before the forks, with what it imports
import datasets  # noqa: F401
import pytest
import torch

from forked import Ended, start
from trainwright.checkpoint.layout import sort_checkpoints
from trainwright.checkpoint.manifest import problems
from trainwright.parallel.lost_ranks import LostRanks

HERE = Path(__file__).parent
SCRIPT, ACCIDENT = HERE / "script.py", HERE / "accident.py"
_spec = importlib.util.spec_from_file_location("accident", ACCIDENT)
assert _spec is not None and _spec.loader is not None
accident = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(accident)

LIMIT_S = 150.0  # what ends by itself does so in a fraction of it; what waits for ddp_timeout=1800 does not


def arguments(folder: Path, **more: Any) -> list[str]:
    values = {
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 6,
        "save_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 4, "log_level": "warning",
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in {"output_dir": folder, **values, **more}.items()]


def ranks(size: int, **more: Any) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
    return [{name: str(value) for name, value in {"RANK": r, "LOCAL_RANK": r, **place}.items()} for r in range(size)]


def run(folder: Path, environments: list[dict[str, str]], kind: str, rank: int, step: int, **more: Any) -> list[Ended]:
    def action(_: int) -> None:
        accident.run(kind, rank, step, SCRIPT, arguments(folder, **more))

    return start(environments, action, folder / f"processes-{os.urandom(4).hex()}", limit_s=LIMIT_S)


def found(folder: Path, size: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run(folder, ranks(2), "kill", -1, -1)
    assert [one.code for one in ended] == [0, 0], "\n".join(one.error + one.output for one in ended)
    return found(folder, 2)


def assert_same_end(folder: Path, undisturbed: list[dict[str, Any]]) -> None:
    for one, other in zip(found(folder, 2), undisturbed, strict=True):
        assert one["steps"] == other["steps"] == 6
        assert one["losses"] == other["losses"]
        assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))
        assert one["seen"] == other["seen"][-len(one["seen"]) :] and 0 < len(one["seen"]) < len(other["seen"])


# -- named, and all end ------------------------------------------------------------------------------------------------


def test_a_killed_rank_ends_all_and_is_named_once(tmp_path: Path) -> None:
    ended = run(tmp_path, ranks(3), "kill", 1, 3)
    assert [one.code for one in ended] == [1, -signal.SIGKILL, 1]
    together = "".join(one.output for one in ended)
    assert together.count("Rank 1 of 3 is gone") == together.count(" gone (process") == 1


def test_a_killed_rank_0_is_named_by_the_others(tmp_path: Path) -> None:
    ended = run(tmp_path, ranks(2), "kill", 0, 3)
    assert [one.code for one in ended] == [-signal.SIGKILL, 1]
    assert ended[1].output.count("rank 0 is gone") == 1


def test_a_rank_that_hangs_ends_all_is_named_once_and_says_where_it_is(tmp_path: Path) -> None:
    ended = run(tmp_path, ranks(2), "hang", 1, 3, ddp_timeout=8)
    assert [one.code for one in ended] == [1, 1]
    together = "".join(one.output for one in ended)
    assert together.count("Rank 1 of 2 took no part in an exchange") == 1
    assert "ddp_timeout=8 s" in ended[0].output
    assert "rank 1 of 2 has not ended" in ended[1].output and "in hangs_here" in ended[1].output


def test_a_rank_that_fails_is_named_where_another_one_ends_because_of_it(tmp_path: Path) -> None:
    ended = run(tmp_path, ranks(2), "raise", 1, 3)
    assert [one.code for one in ended] == [1, 1]
    assert "ValueError: a bad sample" in ended[1].error
    assert ended[0].output.count("Rank 1 of 2 failed first: ValueError: a bad sample") == 1
    assert "gone" not in ended[0].output and "took no part" not in ended[0].output


def lost_ranks(folder: Path, of_rank: dict[int, Any]) -> list[Ended]:
    """Processes that do `of_rank[rank](folder)` where they may lose each other, with a ddp_timeout of 4 s."""

    def action(rank: int) -> None:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=len(of_rank))

        def before_end(limit_s: float) -> None:
            (folder / "before-end").write_text(f"{limit_s:g}")

        with LostRanks(4.0, before_end):
            torch.distributed.barrier()  # all have entered
            of_rank[rank](folder)
        (folder / f"left-{rank}").touch()

    return start([{}] * len(of_rank), action, folder, limit_s=LIMIT_S)


def dies(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def waits_for_nobody(folder: Path) -> None:
    """As with NCCL, where a process that has died ends no exchange."""
    time.sleep(3600)


def test_a_rank_that_waits_for_a_dead_one_of_its_machine_without_knowing_it_ends(tmp_path: Path) -> None:
    ended = lost_ranks(tmp_path, {0: waits_for_nobody, 1: dies})
    assert [one.code for one in ended] == [1, -signal.SIGKILL]
    assert ended[0].output.count("rank 0 of 2 has not ended 1 s after rank 1 failed (its process ") == 1
    assert "in waits_for_nobody" in ended[0].output
    assert (tmp_path / "before-end").read_text() == "1"


def test_a_rank_that_has_left_is_not_lost(tmp_path: Path) -> None:
    def stays_longer(folder: Path) -> None:
        while not (folder / "left-1").exists():
            time.sleep(0.01)
        time.sleep(2)  # four looks

    ended = lost_ranks(tmp_path, {0: stays_longer, 1: lambda folder: None})
    assert [(one.code, one.output) for one in ended] == [(0, ""), (0, "")]


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_notice_to_one_rank_stops_all_after_one_step_and_is_said_once(tmp_path: Path, name: str, rank: int) -> None:
    ended = run(tmp_path, ranks(2), name, rank, 3, save_strategy="steps", save_steps=100)
    assert [one.code for one in ended] == [128 + getattr(signal, name)] * 2
    assert "".join(one.output for one in ended).count(f"{name} received") == 1
    (checkpoint,) = sort_checkpoints(tmp_path)
    assert checkpoint.endswith("checkpoint-4") and problems(checkpoint) == []


def test_a_slurm_job_is_requeued_once_and_its_next_life_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    job = {"SLURM_JOB_ID": 4711, "SLURM_STEP_ID": 0}
    for ended in run(tmp_path, ranks(2, **job), "SIGUSR1", 1, 2, requeue_on_signal=True, save_steps=100):
        assert ended.code == 128 + signal.SIGUSR1, ended.error
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    for ended in run(tmp_path, ranks(2, SLURM_RESTART_COUNT=1, **job), "SIGUSR1", 1, 2, requeue_on_signal=True):
        assert ended.code == 0, ended.error
    assert_same_end(tmp_path, undisturbed)


# -- restarts ----------------------------------------------------------------------------------------------------------


def life(count: int, run_id: str = "one") -> dict[str, Any]:
    return {"TORCHELASTIC_RUN_ID": run_id, "TORCHELASTIC_RESTART_COUNT": count}


def test_a_restarted_run_resumes_from_its_newest_good_checkpoint(tmp_path: Path, undisturbed: Any) -> None:
    assert run(tmp_path, ranks(2, **life(0)), "kill", 1, 5)[0].code == 1
    newest = sort_checkpoints(tmp_path)[-1]
    assert newest.endswith("checkpoint-4")
    (Path(newest) / "optimizer.pt").write_bytes(b"")
    ended = run(tmp_path, ranks(2, **life(1)), "kill", 1, 5)
    assert [one.code for one in ended] == [0, 0], "\n".join(one.error + one.output for one in ended)
    assert "DAMAGED" in ended[0].output and "the run is resumed from" in ended[0].output
    assert_same_end(tmp_path, undisturbed)
    assert len(found(tmp_path, 2)[0]["seen"]) == 4 * (6 - 2)


@pytest.mark.parametrize("second", [life(0), life(1, "another"), {}])
def test_what_is_no_restart_of_the_same_job_starts_anew(tmp_path: Path, second: dict[str, Any]) -> None:
    run(tmp_path, ranks(2, **life(0)), "kill", 1, 5)
    ended = run(tmp_path, ranks(2, **second), "none", -1, -1)
    assert [one.code for one in ended] == [0, 0], "\n".join(one.error + one.output for one in ended)
    assert len(found(tmp_path, 2)[0]["seen"]) == 4 * 6


def test_torchrun_restarts_a_killed_rank_and_the_run_ends_as_if_nothing_had_been(
    tmp_path: Path, undisturbed: Any
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*torchrun, str(ACCIDENT), "kill", "1", "5", str(SCRIPT), *arguments(tmp_path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    environ.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, error = process.communicate(timeout=2 * LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, error
    assert "exitcode: -9" in error and "local_rank: 1" in error
    assert_same_end(tmp_path, undisturbed)
