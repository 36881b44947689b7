"""What an evaluation costs per batch above a bare forward loop: calls and reads from the device.

Counts only, so the result does not depend on the machine or its load; `benchmarks/evaluation.py` has the times.
"""

import contextlib
import gc
import io

import pytest
import torch

from of_runs import benchmark_module
from trainwright.data import batch_groups

MOST_PYTHON_CALLS, MOST_C_CALLS = 13, 18  # per batch above forward only, with progress bar, predictions and labels kept
MOST_PYTHON_CALLS_LOSS_ONLY, MOST_C_CALLS_LOSS_ONLY = 14, 16


probes, evaluation = benchmark_module("probes"), benchmark_module("evaluation")


@pytest.fixture(autouse=True)
def groups_of_full_size(monkeypatch):
    """A group of batches also ends when it took long, which on a busy machine would decide what is counted here."""
    monkeypatch.setattr(batch_groups, "MOST_WAIT_S", 60.0)


def calls(run, num_batches):
    """(Python calls, C calls) of one whole pass over `num_batches` batches."""
    counter, silence = probes.CallCounter(), io.StringIO()
    with probes.still_progress_bars(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        run(20)  # what happens once, such as imports
        gc.collect()
        gc.disable()  # finalizers of what earlier tests left behind are calls too
        counter.start()
        try:
            run(num_batches)
        finally:
            counter.stop()
            gc.enable()
    return counter.num_python, counter.num_c


def calls_per_batch(run, first=50, last=150):
    """Calls of one batch more: what a pass does once, before and after its batches, is left out."""
    few, many = calls(run, first), calls(run, last)
    return tuple((m - f) / (last - first) for f, m in zip(few, many))


def above_forward(run):
    ours, bare = calls_per_batch(run), calls_per_batch(evaluation.forward_only())
    return tuple(one - other for one, other in zip(ours, bare))


def test_a_batch_makes_few_calls_above_a_forward_pass(tmp_path):
    python_calls, c_calls = above_forward(evaluation.with_trainer("trainwright", tmp_path))
    assert python_calls <= MOST_PYTHON_CALLS
    assert c_calls <= MOST_C_CALLS


def test_a_batch_of_which_only_the_loss_is_kept_makes_fewer(tmp_path):
    python_calls, c_calls = above_forward(evaluation.with_trainer("trainwright", tmp_path, prediction_loss_only=True))
    assert python_calls <= MOST_PYTHON_CALLS_LOSS_ONLY
    assert c_calls <= MOST_C_CALLS_LOSS_ONLY


def test_a_later_batch_costs_no_more_than_an_early_one(tmp_path):
    run = evaluation.with_trainer("trainwright", tmp_path)
    early, late = calls_per_batch(run, 64, 128), calls_per_batch(run, 320, 384)  # whole runs of batches
    assert late == early


class Metric:
    """Counts nothing: what the loop itself does for a streaming metric."""

    def update(self, predictions, labels):
        """Nothing."""

    def compute(self):
        return 0.0

    def reset(self):
        """Nothing."""


RUNS = {
    "predictions": {},
    "predictions moved every batch": {"eval_accumulation_steps": 1},
    "loss only": {"prediction_loss_only": True},
    "sorted by length": {"eval_sampling_strategy": "length_sorted"},
}


@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("metrics", [None, Metric()], ids=["", "streamed"])
def test_no_batch_reads_from_the_device(tmp_path, arguments, metrics):
    """Reads are the same for any number of batches: those at the end. (Batches on a CPU need no move.)"""
    reads = []
    run = evaluation.with_trainer("trainwright", tmp_path, compute_metrics=metrics, **arguments)
    for num_batches in (10, 60):
        counter, silence = probes.OpCounter(), io.StringIO()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            counter.start()
            try:
                run(num_batches)
            finally:
                counter.stop()
        assert sum(counter.ops.values()) > num_batches
        reads.append(counter.syncs)
    assert reads[0] == reads[1]


def test_the_probe_sees_a_read_that_an_override_adds(tmp_path):
    class Curious(evaluation.library("trainwright").Trainer):
        def prediction_step(self, *args, **kwargs):
            result = super().prediction_step(*args, **kwargs)
            self.last_loss = result[0].item()
            return result

    run = evaluation.with_trainer("trainwright", tmp_path, cls=Curious)
    counts = []
    for num_batches in (10, 60):
        counter = probes.OpCounter()
        counter.start()
        try:
            run(num_batches)
        finally:
            counter.stop()
        counts.append(sum(counter.syncs.values()))
    assert counts[1] - counts[0] == 50


def test_accumulating_costs_a_constant_number_of_operations_per_batch():
    from trainwright.evaluation.prediction_store import EvalLoopContainer

    counts = []
    for num_batches in (320, 640):
        counter = probes.CallCounter()
        batches = [torch.ones(2, 3) for _ in range(num_batches)]
        counter.start()
        container = EvalLoopContainer()
        for batch in batches:
            container.add(batch)
        container.get_arrays()
        counter.stop()
        counts.append(counter.num_python)
    assert counts[1] / counts[0] == pytest.approx(2, rel=0.1)
    assert counts[1] / 640 < 3
