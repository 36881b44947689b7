"""Every generator a run draws from starts at the seed."""

import os
import random

import numpy as np
import pytest
import torch

from trainwright.seeding import enable_full_determinism, set_seed


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.fixture
def torch_settings(monkeypatch):
    """Put torch's switches and the environment back."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic


def test_one_seed_decides_python_numpy_and_torch():
    set_seed(3)
    first = draw()
    after = draw()
    set_seed(3)
    assert draw() == first != after
    set_seed(4)
    assert all(a != b for a, b in zip(draw(), first))


def test_a_seed_of_more_than_32_bits_is_accepted():
    set_seed(2**32 + 5)
    large = draw()
    set_seed(5)
    assert draw()[1] == large[1]  # NumPy takes the lower 32 bits
    assert draw()[0] != large[0]


@pytest.mark.usefixtures("torch_settings")
def test_deterministic_seeding_makes_torch_refuse_other_kernels():
    set_seed(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize("warn_only", [False, True])
def test_full_determinism_seeds_and_switches_everything(warn_only):
    enable_full_determinism(7, warn_only=warn_only)
    full = draw()
    set_seed(7)
    assert draw() == full
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8" and os.environ["CUDA_LAUNCH_BLOCKING"] == "1"
