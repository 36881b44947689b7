"""Documented odds and ends, where possible against the installed release."""

from __future__ import annotations

import functools
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainwright.compat import evaluation_functions


class Generators:
    """Stands where `torch.cuda` does: keeps the states it is given."""

    def __init__(self) -> None:
        self.random = self
        self.states: dict[str, Any] = {}

    def set_rng_state(self, state: Any) -> None:
        self.states["one"] = state

    def set_rng_state_all(self, state: Any) -> None:
        self.states["all"] = state


def test_device_random_state_is_put_back_for_one_device_or_all() -> None:
    module = Generators()
    evaluation_functions.set_rng_state_for_device("CUDA", module, {"cuda": 1}, is_distributed=False)
    evaluation_functions.set_rng_state_for_device("NPU", module, {"npu": 2}, is_distributed=True)
    assert module.states == {"one": 1, "all": 2}


def test_a_missing_device_random_state_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        evaluation_functions.set_rng_state_for_device("CUDA", Generators(), {}, is_distributed=False)
    assert "CUDA random state not restored" in caplog.text


def test_warnings_are_given_again_except_the_one_about_schedules() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("first", FutureWarning, stacklevel=1)
        warnings.warn("Please also save or load the state of the optimizer when saving.", stacklevel=1)
        warnings.warn("second", UserWarning, stacklevel=1)
    with pytest.warns() as again:
        evaluation_functions.reissue_pt_warnings(caught)
    assert [(w.category, str(w.message)) for w in again] == [(FutureWarning, "first"), (UserWarning, "second")]


def test_numpy_random_state_loads_with_weights_only(tmp_path: Path) -> None:
    state = np.random.RandomState(3).get_state()
    torch.save({"numpy": state}, tmp_path / "rng_state.pth")
    with evaluation_functions.safe_globals():
        loaded = torch.load(tmp_path / "rng_state.pth", weights_only=True)["numpy"]
    assert (loaded[1] == state[1]).all() and loaded[2] == state[2]


def test_placeholders_are_deleted_on_the_main_process_only(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    evaluation_functions.remove_dummy_checkpoint(False, tmp_path, ["weights"])
    assert (tmp_path / "weights").exists()
    evaluation_functions.remove_dummy_checkpoint(True, tmp_path, ["weights", "absent"])
    assert not (tmp_path / "weights").exists()


def test_arguments_are_counted_without_those_a_partial_fixed() -> None:
    def function(a: int, b: int = 1, *c: int, d: int) -> None: ...

    counts = [evaluation_functions.number_of_arguments(f) for f in (function, functools.partial(function, d=2))]
    assert counts == [4, 3]


CAUSAL = torch.ones(4, 4).tril()
MASKS = {
    "none": None,
    "causal": CAUSAL,
    "bool": CAUSAL.bool(),
    "full": torch.ones(4, 4),
    "additive": torch.full((4, 4), float("-inf")).triu(1),
    "leak": CAUSAL + torch.eye(4).roll(1, 1) * (torch.arange(4) == 1),
    "rectangular": torch.ones(4, 6).tril(),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("num_extra_dimensions", range(4))
def test_causal_masks_are_told_apart_like_in_the_installed_release(name: str, num_extra_dimensions: int) -> None:
    reference = pytest.importorskip("transformers.trainer_pt_utils")
    if not hasattr(reference, "is_attention_mask_causal"):
        pytest.skip("the installed release is older than this function")
    mask = MASKS[name]
    if mask is not None:
        mask = mask[(None,) * num_extra_dimensions]
    assert evaluation_functions.is_attention_mask_causal(mask) is bool(reference.is_attention_mask_causal(mask))


def test_one_sample_that_looks_ahead_makes_the_batch_not_causal() -> None:
    assert not evaluation_functions.is_attention_mask_causal(torch.stack([CAUSAL, torch.ones(4, 4)]))
