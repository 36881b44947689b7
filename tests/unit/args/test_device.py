"""The device: chosen on first read, with errors that name the argument; two real processes for the process group."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from trainwright.args.training import TrainingArguments
from trainwright.names import ParallelMode

no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerator")


def new(**kwargs):
    return TrainingArguments("out", report_to="none", **kwargs)


def test_the_cpu_is_used_on_request_and_has_no_gpus():
    args = new(use_cpu=True)
    assert args.device == torch.device("cpu") and args.n_gpu == 0 and args._n_gpu == 0
    assert args.parallel_mode == ParallelMode.NOT_PARALLEL and args.train_batch_size == 8


def test_a_number_of_gpus_that_was_set_by_hand_stays():
    args = new(use_cpu=True)
    args._n_gpu = 2
    assert args.n_gpu == 2 and args.train_batch_size == 16 and args.parallel_mode == ParallelMode.NOT_DISTRIBUTED


def test_the_device_is_found_once():
    args = new(use_cpu=True)
    assert args.device is args._setup_devices


def test_half_precision_that_needs_a_gpu_is_refused_on_the_cpu():
    args = new(fp16=True, use_cpu=True)
    with pytest.raises(ValueError, match=r"fp16=True needs a GPU.*bf16"):
        _ = args.device


def test_bfloat16_works_on_the_cpu():
    assert new(bf16=True, use_cpu=True).device.type == "cpu"


def test_tf32_needs_a_gpu_that_has_it():
    with pytest.raises(ValueError, match="tf32=True needs an NVIDIA GPU"):
        _ = new(tf32=True, use_cpu=True).device


def test_float16_runs_on_the_cpu_where_it_is_asked_for_by_name():
    assert new(fp16=True, half_precision_backend="cpu_amp", use_cpu=True).device.type == "cpu"


def test_finding_the_device_leaves_the_precision_of_products_alone():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        _ = new(tf32=False, use_cpu=True).device
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@no_gpu
def test_apples_gpu_is_refused_where_there_is_none():
    with pytest.warns(FutureWarning):
        args = new(use_mps_device=True)
    with pytest.raises(ValueError, match="use_mps_device=True"):
        _ = args.device


def test_a_launcher_that_forgot_the_address_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        _ = new(use_cpu=True).device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_first_gpu_is_used_and_every_visible_one_is_counted():
    args = new(tf32=True)
    assert args.device == torch.device("cuda", 0) and args.n_gpu == torch.cuda.device_count()


WORKER = """
import os, sys
from trainwright.args import TrainingArguments
args = TrainingArguments("out", report_to="none", use_cpu=True, ddp_timeout=60)
path = sys.argv[1]
with args.main_process_first():
    if args.process_index == 0:
        open(path, "w").write("made by the first")
    else:
        print("seen:", open(path).read())
import torch.distributed as dist
print(args.local_rank, args.world_size, args.n_gpu, args.parallel_mode.value, dist.get_backend())
dist.destroy_process_group()
"""


def test_two_processes_join_on_first_use_and_the_first_one_goes_first(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "file")],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    outputs = [process.communicate(timeout=120)[0].split("\n") for process in processes]
    assert outputs[0][:2] == ["seen: made by the first", "1 2 0 distributed gloo"]
    assert outputs[1][0] == "0 2 0 distributed gloo"
