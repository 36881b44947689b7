"""What follows a failed attempt at a run, without a Trainer."""

from types import SimpleNamespace

import pytest
import torch

from trainwright.nonfinite.updates import NonFiniteError
from trainwright.oom_retry import CannotRetry
from trainwright.run import attempts


def settings(mode="split", auto=True):
    return SimpleNamespace(auto_find_batch_size=auto, auto_find_batch_size_mode=mode)


def test_after_a_nan_the_run_goes_on_from_where_it_was_rolled_back_to():
    seen = []

    def attempt(checkpoint):
        seen.append(checkpoint)
        if len(seen) < 3:
            raise NonFiniteError(f"number {len(seen)}")
        return "done"

    assert attempts.with_rollback(attempt, None, lambda error: f"after {error}") == "done"
    assert seen == [None, "after number 1", "after number 2"]


def test_a_rollback_that_cannot_help_ends_the_run_with_the_error():
    def attempt(checkpoint):
        raise NonFiniteError("bad")

    def roll_back(error):
        raise error

    with pytest.raises(NonFiniteError, match="bad"):
        attempts.with_rollback(attempt, None, roll_back)


def run_in_memory(args, batch_size, fits, error=torch.OutOfMemoryError, nothing_is_done=True):
    """(result, sizes that were tried, (size, weight) of each start over) of a run whose batches of `fits` fit."""
    model, tried, restarts = torch.nn.Linear(1, 1, bias=False), [], []
    with torch.no_grad():
        model.weight.fill_(1.0)

    def attempt(batch_size):
        tried.append(batch_size)
        with torch.no_grad():
            model.weight.add_(1.0)  # it trains before memory runs out
        if batch_size > fits:
            raise error("out of memory")
        return batch_size

    def start_over(size, weights):
        restarts.append((size, weights["weight"].item()))

    result = attempts.retry_smaller(
        attempt, args, batch_size, model, nothing_is_done=lambda: nothing_is_done, start_over=start_over
    )
    return result, tried, restarts


def test_restarts_halve_the_batch_until_it_fits_and_begin_with_the_first_weights():
    result, tried, restarts = run_in_memory(settings("restart"), 8, fits=2)
    assert (result, tried) == (2, [8, 4, 2])
    assert restarts == [(4, 1.0), (2, 1.0)]


def test_a_first_batch_that_cannot_be_run_in_parts_starts_the_run_over_with_half_of_it():
    result, tried, restarts = run_in_memory(settings(), 8, fits=4, error=CannotRetry)
    assert (result, tried) == (4, [8, 4])
    assert [size for size, _ in restarts] == [4]


def test_a_run_that_has_done_something_is_not_started_over():
    with pytest.raises(CannotRetry):
        run_in_memory(settings(), 8, fits=4, error=CannotRetry, nothing_is_done=False)


def test_without_the_argument_running_out_of_memory_ends_the_run():
    with pytest.raises(torch.OutOfMemoryError):
        run_in_memory(settings(auto=False), 8, fits=4)
    assert run_in_memory(settings(auto=False), 8, fits=8) == (8, [8], [])
