"""Metrics for people and for files, against the installed release where it has the same function."""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainwright.evaluation import metrics as ours

reference = pytest.importorskip("transformers.trainer_pt_utils")
reference_utils = pytest.importorskip("transformers.trainer_utils")

METRICS = {
    "train_runtime": 3661.4567,
    "eval_runtime": 90000.999,
    "train_mem_cpu_alloc_delta": 1345 * 2**20 + 5,
    "init_mem_gpu_peaked_delta": -3 * 2**20 - 1,
    "total_flos": 12345678901234.0,
    "train_loss": 0.123456789,
    "epoch": 3.0,
    "train_samples": 100,
    "name": "x",
    "flag": True,
}


def reference_format(metrics: dict[str, Any]) -> dict[str, Any]:
    takes_self = "self" in inspect.signature(reference.metrics_format).parameters  # until 5.0
    formatted: dict[str, Any] = reference.metrics_format(*([None] if takes_self else []), metrics)
    return formatted


@pytest.mark.parametrize(
    "counts", [{}, {"num_samples": 10}, {"num_samples": 10, "num_steps": 7, "num_tokens": 12345}, {"num_steps": 0}]
)
@pytest.mark.parametrize("elapsed_s", [3.3333333, 0.0, 1e-3])
def test_speeds_have_the_keys_and_rounding_of_the_installed_release(
    counts: dict[str, int], elapsed_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.123456)
    start = 1000.123456 - elapsed_s
    assert ours.speed_metrics("train", start, **counts) == reference_utils.speed_metrics("train", start, **counts)


def test_a_token_count_may_still_be_a_tensor() -> None:
    speeds = ours.speed_metrics("train", time.time() - 2.0, num_tokens=torch.tensor(100))  # type: ignore[arg-type]
    assert isinstance(speeds["train_tokens_per_second"], float)


def test_readable_metrics_agree_with_the_installed_release() -> None:
    assert ours.metrics_format(METRICS) == reference_format(METRICS)


def test_numpy_and_tensor_metrics_are_rounded_too() -> None:
    formatted = ours.metrics_format({"a": np.float32(1.23456789), "b": torch.tensor(0.1)})
    assert formatted == {"a": 1.2346, "b": 0.1}


def test_the_report_prints_what_the_installed_release_prints(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = SimpleNamespace(is_world_process_zero=lambda: True, metrics_format=reference_format)
    metrics = {key: value for key, value in METRICS.items() if key != "flag"}  # the reference prints True as 1
    reference.log_metrics(trainer, "train", metrics)
    assert capsys.readouterr().out == ours.format_report("train", metrics) + "\n"


def test_a_report_copes_with_no_metrics_and_with_none() -> None:
    assert ours.format_report("eval", {}) == "***** eval metrics *****"
    assert ours.format_report("eval", {"a": None}).splitlines()[1] == "  a = None"


def test_result_files_agree_with_the_installed_release(tmp_path: Path) -> None:
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    trainer = SimpleNamespace(is_world_process_zero=lambda: True, args=SimpleNamespace(output_dir=str(theirs)))
    calls: list[tuple[str, dict[str, Any], bool]] = [
        ("train", {"b": 1.5, "a": [1]}, True),
        ("eval", {"b": 2.5, "c": 1}, True),
        ("test", {"b": 9}, False),
    ]
    for split, metrics, combined in calls:
        reference.save_metrics(trainer, split, metrics, combined)
        ours.write_metrics(mine, split, metrics, combined)
    written = {path.name: path.read_text() for path in mine.iterdir()}
    assert written == {path.name: path.read_text() for path in theirs.iterdir()}


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    ours.write_metrics(tmp_path, "eval", {"a": 1})
    with pytest.raises(TypeError):
        ours.write_metrics(tmp_path, "eval", {"a": object()})
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"a": 1}


def test_numpy_metrics_can_be_written(tmp_path: Path) -> None:
    ours.write_metrics(tmp_path, "eval", {"a": np.float32(0.5), "b": torch.tensor(2)})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"a": 0.5, "b": 2}


@pytest.mark.parametrize(
    "metrics",
    [
        {"eval_loss": 1.0, "epoch": 3},
        {"eval_loss": 1.0, "eval_acc": 0.5, "eval_f1": 0.25, "epoch": 1, "eval_runtime": 3, "eval_steps_per_second": 1},
        {"eval_acc": 1.0},
        {},
        {"epoch": 1},
        {"eval_a_runtime": 1, "eval_a_loss": 2, "eval_loss": 1},
    ],
)
def test_the_default_objective_is_that_of_the_installed_release(metrics: dict[str, float]) -> None:
    assert ours.default_compute_objective(metrics) == reference_utils.default_compute_objective(dict(metrics))


def test_preparation_time_is_no_objective() -> None:
    times = {"eval_model_preparation_time": 7.0, "eval_jit_compilation_time": 5.0}
    assert ours.default_compute_objective({"eval_loss": 2.0, **times}) == 2.0


def test_keys_get_the_prefix_once_and_an_unprefixed_key_wins() -> None:
    metrics = {"eval_acc": 1, "acc": 2, "evalx": 3, "eval_f1": 4}
    assert ours.prefixed(metrics, "eval") == {"eval_acc": 2, "eval_f1": 4, "eval_evalx": 3}


@pytest.mark.parametrize("seconds", [0.001, 5, 59.999, 3661.456, 90000.999, -1.25])
def test_durations_read_like_in_the_installed_release(seconds: float) -> None:
    assert ours._secs2timedelta(seconds) == reference._secs2timedelta(seconds)
