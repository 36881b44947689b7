"""`accelerate launch` itself, with a file and with flags: what it was told holds or is refused, and is not ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("script.py")
LIMIT_S = 300  # many times what it takes
FSDP2 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_machines: 1
num_processes: 2
machine_rank: 0
rdzv_backend: static
use_cpu: false
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: SIZE_BASED_WRAP
  fsdp_min_num_params: 1
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def launch(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The script under `accelerate launch` with `flags`; nothing of it is left afterwards."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *flags]
    values = ("--output_dir", str(folder), "--report_to=none", "--disable_tqdm=True", "--save_strategy=no")
    command = [*launcher, str(SCRIPT), *values, "--max_steps=2", "--per_device_train_batch_size=4", "--log_level=info"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    environ |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "no-default-config")}
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, error = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, error)


def test_a_file_that_asks_for_fsdp_is_no_data_parallel_run(tmp_path: Path) -> None:
    config = tmp_path / "fsdp2.yaml"
    config.write_text(FSDP2)
    done = launch(tmp_path, "--config_file", str(config), "--main_process_port", "0")
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=False) for rank in range(2)]
    assert [one["ranks"] for one in found] == [(0, 2, 0), (1, 2, 1)]
    # Each parameter has one row: it is that of one process.
    assert [sum(both) for both in zip(*(one["num_local"] for one in found))] == [2, 1]
    torch.testing.assert_close(found[0]["weights"], found[1]["weights"], rtol=0, atol=0)


def test_flags_of_processes_and_precision_hold(tmp_path: Path) -> None:
    flags = ("--multi_gpu", "--num_processes=2", "--mixed_precision=bf16", "--main_process_port=0")
    done = launch(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=False) for rank in range(2)]
    assert [one["ranks"] for one in found] == [(0, 2, 0), (1, 2, 1)]
    assert [one["mixed_precision"] for one in found] == ["bf16", "bf16"]
    assert not set(found[0]["seen"]) & set(found[1]["seen"])
    assert "From `accelerate launch`: bf16=True" in done.stderr


def test_one_process_in_place_of_several_on_a_cpu_is_said(tmp_path: Path) -> None:
    done = launch(tmp_path, "--cpu", "--num_processes=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("has started this one alone") == 1
    (found,) = [torch.load(path, weights_only=False) for path in tmp_path.glob("found-*")]
    assert found["ranks"] == (0, 1, -1)
