"""One unchanged script under every launcher trains one model on all the data; what cannot start says so in seconds."""

from __future__ import annotations

import logging
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import accelerate.data_loader  # noqa: F401  imported before the forks, with what it imports
import datasets  # noqa: F401
import pytest
import torch

from forked import Ended, start
from trainwright import TrainingArguments
from trainwright.args import rendezvous

SCRIPT = Path(__file__).with_name("script.py")
ARGUMENTS = {
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 4,
    "learning_rate": 0.01,
    "ddp_timeout": 60,
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_script(folder: Path, *more: str) -> None:
    arguments = {"output_dir": folder, **ARGUMENTS}
    sys.argv = [str(SCRIPT), *(f"--{name}={value}" for name, value in arguments.items()), *more]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def as_strings(values: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def ranks(rank: int, **more: Any) -> dict[str, str]:
    """As torchrun, the deepspeed launcher and Ray Train set them."""
    return as_strings({"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", **more})


def variables_of(launcher: str, rank: int, port: int) -> dict[str, str]:
    """What process `rank` of two on this machine has from a launcher."""
    job = port  # the port where they meet is derived from it
    match launcher:
        case "srun":
            task = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_STEP_ID": 0}
            step = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NUM_NODES": 1, "SLURM_STEP_NODELIST": "here"}
            return as_strings({**task, **step, "SLURM_JOB_ID": job, "SLURM_NTASKS": 2})
        case "mpirun":
            names = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
            ompi = {f"OMPI_COMM_WORLD_{name}": value for name, value in names.items()}
            return as_strings({**ompi, "PMIX_NAMESPACE": f"prterun-{job}"})
        case "mpiexec of MPICH":
            names = {"PMI_RANK": rank, "PMI_SIZE": 2, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": 2}
            return as_strings({**names, "MASTER_PORT": port})
        case "submitit":
            names = {"GLOBALID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": 2, "NNODES": 1, "JOB_ID": job}
            return as_strings({f"SUBMITIT_LOCAL_{name}": value for name, value in names.items()})
        case "Kubeflow's PyTorchJob":
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
            return as_strings({"RANK": rank, "WORLD_SIZE": 2, "PET_NNODES": 2, **place})
        case "Kubeflow's Trainer":
            place = {"PET_MASTER_ADDR": "127.0.0.1", "PET_RDZV_ID": f"job-{job}"}
            return as_strings({"PET_NNODES": 2, "PET_NPROC_PER_NODE": 1, "PET_NODE_RANK": rank, **place})
        case "SkyPilot":
            task = {"SKYPILOT_NUM_NODES": 2, "SKYPILOT_NODE_RANK": rank, "SKYPILOT_TASK_ID": f"sky-{job}"}
            return as_strings({**task, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "SKYPILOT_NUM_GPUS_PER_NODE": 1})
        case "deepspeed":
            sizes = {"CROSS_RANK": 0, "CROSS_SIZE": 1, "LOCAL_SIZE": 2}
            return ranks(rank, MASTER_PORT=port, **sizes)
        case "Ray Train":
            return ranks(rank, MASTER_PORT=port, LOCAL_WORLD_SIZE=2, NODE_RANK=0)
    raise AssertionError(launcher)


LAUNCHERS = (
    "srun",
    "mpirun",
    "mpiexec of MPICH",
    "submitit",
    "Kubeflow's PyTorchJob",
    "Kubeflow's Trainer",
    "SkyPilot",
    "deepspeed",
    "Ray Train",
)
ONE_PER_MACHINE = ("Kubeflow's PyTorchJob", "Kubeflow's Trainer", "SkyPilot")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script finds in one process, with micro-batches as large as those of two together."""
    folder = tmp_path_factory.mktemp("alone")
    before, level = sys.argv, logging.getLogger("trainwright").level
    try:  # in this process, so that the forks have what it imports
        with pytest.raises(SystemExit):
            run_script(folder, "--per_device_train_batch_size=8")
    finally:
        sys.argv = before
        logging.getLogger("trainwright").setLevel(level)
    return torch.load(folder / "found-0.pt", weights_only=False)


def assert_trained_together(folder: Path, alone: dict[str, Any]) -> list[dict[str, Any]]:
    found = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]
    assert [one["ranks"][:2] for one in found] == [(0, 2), (1, 2)]
    seen = [number for one in found for number in one["seen"]]
    assert sorted(seen) == sorted(alone["seen"]) and len(set(seen)) == 4 * 8
    for one in found:
        assert one["steps"] == alone["steps"]
        assert one["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        torch.testing.assert_close(one["weights"], alone["weights"], rtol=1e-5, atol=1e-6)
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_unchanged_script_trains_one_model_in_all_processes(launcher: str, tmp_path: Path, alone: Any) -> None:
    port = free_port()

    def action(rank: int) -> None:
        if launcher == "Ray Train":  # which makes the process group before it calls the script
            torch.distributed.init_process_group("gloo")
        more = (f"--local_rank={rank}",) if launcher == "deepspeed" else ()
        run_script(tmp_path, "--per_device_train_batch_size=4", *more)

    ended = start([variables_of(launcher, rank, port) for rank in range(2)], action, tmp_path / "processes")
    assert [one.code for one in ended] == [0, 0], "\n".join(one.error + one.output for one in ended)
    found = assert_trained_together(tmp_path, alone)
    assert [one["ranks"][2] for one in found] == ([0, 0] if launcher in ONE_PER_MACHINE else [0, 1])


# -- what cannot start -------------------------------------------------------------------------------------------------


def join(_: int) -> None:
    logging.getLogger("trainwright").setLevel(logging.WARNING)  # tests before this one may have changed it
    args = TrainingArguments("out", report_to="none", use_cpu=True, ddp_start_timeout=2)
    _ = args.device


def errors_of(tmp_path: Path, *environments: dict[str, str]) -> list[Ended]:
    ended = start(environments, join, tmp_path, limit_s=60)
    assert all(one.code == 1 for one in ended), "\n".join(one.output for one in ended)
    return ended


def test_ranks_that_never_come_are_named_in_all_others(tmp_path: Path) -> None:
    environments = [ranks(rank, WORLD_SIZE=4, MASTER_PORT=free_port()) for rank in (0, 2)]
    environments[1]["MASTER_PORT"] = environments[0]["MASTER_PORT"]
    for ended in errors_of(tmp_path, *environments):
        assert "WORLD_SIZE=4, but ranks 1, 3 did not come" in ended.error


def test_two_processes_with_one_rank_are_named(tmp_path: Path) -> None:
    port = free_port()
    _, *others = errors_of(tmp_path, *(ranks(rank, WORLD_SIZE=3, MASTER_PORT=port) for rank in (0, 1, 1)))
    assert sum("Two processes that meet at" in one.error and "have RANK=1" in one.error for one in others) == 1


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)])
def test_processes_that_were_told_different_numbers_of_processes_are_named(tmp_path: Path, sizes: Any) -> None:
    port = free_port()
    for ended in errors_of(tmp_path, *(ranks(rank, WORLD_SIZE=sizes[rank], MASTER_PORT=port) for rank in (0, 1))):
        assert f"WORLD_SIZE={sizes[0]} in rank 0 at 127.0.0.1:{port}, but rank 1 has {sizes[1]}" in ended.error


@pytest.mark.parametrize(
    ("backend", "says"), [("nccl", "'cuda', and this run is on the CPU"), ("mpi", "no backend 'mpi'")]
)
def test_a_backend_that_cannot_be_used_here_is_named_before_processes_meet(
    tmp_path: Path, backend: str, says: str
) -> None:
    def join_by_backend(_: int) -> None:
        _ = TrainingArguments("out", report_to="none", use_cpu=True, ddp_backend=backend).device

    (ended,) = start([ranks(1, MASTER_PORT=free_port())], join_by_backend, tmp_path, limit_s=60)
    assert ended.code == 1 and says in ended.error


def test_rank_0_that_does_not_listen_is_named(tmp_path: Path) -> None:
    (ended,) = errors_of(tmp_path, ranks(1, MASTER_PORT=free_port()))
    assert "Rank 1 of 2 could not reach rank 0 at 127.0.0.1:" in ended.error and "Connection refused" in ended.error


def test_a_machine_that_does_not_exist_is_named_before_the_time_to_start_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "UNREACHABLE_S", 0.1)
    monkeypatch.setattr(rendezvous, "START_S", 3600.0)
    environ = ranks(1, MASTER_ADDR="no-such-machine.invalid", MASTER_PORT=29500)

    def join_patiently(_: int) -> None:
        _ = TrainingArguments("out", report_to="none", use_cpu=True).device

    (ended,) = start([environ], join_patiently, tmp_path, limit_s=60)
    assert ended.code == 1 and "could not reach rank 0 at no-such-machine.invalid:29500" in ended.error


def test_a_port_that_is_not_free_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        (ended,) = errors_of(tmp_path, ranks(0, MASTER_PORT=other.getsockname()[1]))
    assert "Rank 0 of 2 cannot open port" in ended.error and "set MASTER_PORT to a free port" in ended.error


def test_who_is_waited_for_is_said_long_before_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "NOTICE_S", (0.2, 3600.0))
    port = free_port()
    first, second = errors_of(tmp_path, *(ranks(rank, WORLD_SIZE=3, MASTER_PORT=port) for rank in (0, 1)))
    assert first.output.count("Rank 0 waits for rank 2 of 3 to start") == 1
    assert "waits for" not in second.output
