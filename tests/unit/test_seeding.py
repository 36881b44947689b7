"""Every generator a run draws from starts at the seed, and can be set to where it stood."""

import json
import os
import random

import numpy as np
import pytest
import torch

from trainwright.seeding import RngState, enable_full_determinism, set_seed


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


@pytest.mark.parametrize(
    "again",
    [
        lambda state: state,
        lambda state: RngState.from_state_dict(state.state_dict()),
        lambda state: RngState.from_json(json.loads(json.dumps(state.to_json()))),
    ],
    ids=["as it is", "by its file", "by JSON"],
)
def test_captured_generators_give_the_same_numbers_again(again):
    random.gauss(0, 1), np.random.normal()  # each holds a second number back
    torch.rand(3)
    state = RngState.capture()
    expected = [draw(), random.gauss(0, 1), np.random.normal()]
    assert [draw(), random.gauss(0, 1), np.random.normal()] != expected
    again(state).restore()
    assert [draw(), random.gauss(0, 1), np.random.normal()] == expected


class Devices:
    """As a module of torch for a kind of accelerator, whose random states are numbers of bytes."""

    def __init__(self, *states, used=True):
        self.states, self.used = [torch.tensor(state, dtype=torch.uint8) for state in states], used

    def is_available(self):
        return True

    def is_initialized(self):
        return self.used

    def device_count(self):
        return len(self.states)

    def get_rng_state(self):
        return self.states[0].clone()

    def get_rng_state_all(self):
        return [state.clone() for state in self.states]

    def set_rng_state(self, state, device=0):
        self.states[device] = state

    def set_rng_state_all(self, states):
        self.states = list(states)


def captured(monkeypatch, devices, **options):
    monkeypatch.setattr(torch, "mlu", devices, raising=False)
    return RngState.capture(("mlu",), **options)


def values(devices):
    return [int(state) for state in devices.states]


def test_states_of_accelerators_are_restored_on_each_device(monkeypatch):
    devices = Devices(3, 4)
    state = captured(monkeypatch, devices)
    devices.set_rng_state_all([torch.tensor(0), torch.tensor(0)])
    state.restore()
    assert values(devices) == [3, 4]


def test_one_of_several_processes_captures_its_current_device_only(monkeypatch):
    state = captured(monkeypatch, Devices(3, 4), every_device=False)
    monkeypatch.setattr(torch, "mlu", now := Devices(0, 0))
    state.restore()
    assert values(now) == [3, 0]


def test_a_device_that_was_never_used_is_not_asked(monkeypatch):
    assert captured(monkeypatch, Devices(3, used=False)).devices == {}


def test_with_fewer_devices_the_first_states_are_restored_and_a_warning_says_so(monkeypatch, caplog):
    state = captured(monkeypatch, Devices(3, 4))
    monkeypatch.setattr(torch, "mlu", now := Devices(0))
    state.restore("rng_state.pth")
    assert values(now) == [3]
    assert "rng_state.pth holds the random state of 2 mlu devices, here are 1" in caplog.text


def test_the_state_of_an_accelerator_that_this_machine_lacks_warns(monkeypatch, caplog):
    state = captured(monkeypatch, Devices(3))
    monkeypatch.delattr(torch, "mlu")
    state.restore("rng_state.pth")
    assert "rng_state.pth holds the random state of mlu, which this machine lacks" in caplog.text
