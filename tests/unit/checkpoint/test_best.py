"""Metrics by name, comparisons, and finding the best checkpoint again."""

import math

import pytest

from trainwright.checkpoint.best import MetricNotFound, is_better, locate, metric_value


@pytest.mark.parametrize("name", ["accuracy", "eval_accuracy"])
def test_a_metric_is_found_with_and_without_its_prefix(name):
    assert metric_value({"eval_accuracy": 0.5, "eval_loss": 2}, name) == 0.5
    assert metric_value({"accuracy": 0.25}, name) == 0.25


def test_an_unknown_metric_is_reported_with_what_is_there_and_the_nearest():
    with pytest.raises(MetricNotFound) as error:
        metric_value({"eval_accuracy": 0.5, "eval_loss": 2.0}, "acuracy")
    assert isinstance(error.value, KeyError) and isinstance(error.value, ValueError)
    assert "['eval_accuracy', 'eval_loss']" in str(error.value)
    assert "Did you mean 'eval_accuracy'?" in str(error.value)


def test_nan_is_never_better_and_anything_beats_nan():
    nan = math.nan
    assert not is_better(nan, None, True) and not is_better(nan, 0.1, False) and not is_better(nan, nan, True)
    assert is_better(-1.0, None, True) and is_better(-1.0, nan, True)


def test_the_direction_and_the_threshold_decide():
    assert is_better(2.0, 1.0, True) and not is_better(2.0, 1.0, False)
    assert not is_better(1.0, 1.0, True) and not is_better(1.0, 1.0, False)
    assert not is_better(1.25, 1.0, True, threshold=0.25) and is_better(1.5, 1.0, True, threshold=0.25)
    assert is_better(0.5, 1.0, False, threshold=0.25) and not is_better(0.75, 1.0, False, threshold=0.25)


def test_the_best_checkpoint_is_found_after_the_output_directory_moved(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "checkpoint-4").mkdir(parents=True)
    best = str(old / "checkpoint-4")
    assert locate(best, old) == best
    old.rename(new)
    assert locate(best, new) == str(new / "checkpoint-4")
    assert locate(best, tmp_path) is None
    assert locate(None, new) is None
