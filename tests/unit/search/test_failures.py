import pytest
import torch

from trainwright.nonfinite.updates import NonFiniteError
from trainwright.oom_retry import CannotRetry
from trainwright.search import failures
from trainwright.search.backends import NamedTrial

TRIAL = NamedTrial({}, "a7")


def raising(error):
    def objective(trial, checkpoint_dir=None):
        raise error

    return failures.with_trial_failures(objective)


@pytest.mark.parametrize("error", [NonFiniteError("nan"), torch.OutOfMemoryError("full"), CannotRetry("packed")])
def test_nan_and_too_little_memory_fail_the_trial_and_are_named(error, caplog):
    with pytest.raises(failures.TrialFailed, match=type(error).__name__) as caught:
        raising(error)(TRIAL)
    assert caught.value.__context__ is None  # nothing keeps the trial's tensors alive
    assert "TRIAL a7 FAILED" in caplog.text


def test_any_other_error_passes():
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())(TRIAL)


def test_with_several_processes_memory_that_ran_out_in_one_ends_the_search(monkeypatch):
    monkeypatch.setattr(failures, "world", lambda: (1, 2))
    with pytest.raises(torch.OutOfMemoryError):
        raising(torch.OutOfMemoryError("full"))(TRIAL)
    with pytest.raises(failures.TrialFailed):
        raising(NonFiniteError("nan"))(TRIAL)


def test_a_result_is_handed_on():
    assert failures.with_trial_failures(lambda trial, checkpoint_dir=None: checkpoint_dir)(TRIAL, "there") == "there"
