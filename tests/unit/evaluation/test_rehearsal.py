"""A metric that could never be found is found before the first step."""

import logging
import types

import pytest

from trainwright.evaluation.rehearsal import check_metric_name, needs_metric, rehearse
from trainwright.names import SaveStrategy, SchedulerType
from trainwright.outputs import EvalLoopOutput


def arguments(**changes):
    values = {
        "metric_for_best_model": "accuracy",
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "save_strategy": SaveStrategy.STEPS,
        "lr_scheduler_type": SchedulerType.LINEAR,
    }
    return types.SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"metric_for_best_model": None}, False),
        ({"eval_strategy": "no"}, False),
        ({"load_best_model_at_end": False}, False),
        ({"load_best_model_at_end": False, "save_strategy": SaveStrategy.BEST}, True),
        ({"load_best_model_at_end": False, "lr_scheduler_type": SchedulerType.REDUCE_ON_PLATEAU}, True),
        ({"load_best_model_at_end": False, "lr_scheduler_type": SchedulerType.GREEDY}, True),
    ],
)
def test_a_metric_is_needed_where_something_is_chosen_by_it(changes, expected):
    assert needs_metric(arguments(**changes)) == expected


@pytest.mark.parametrize("name", ["loss", "eval_loss", "eval_runtime", "steps_per_second"])
def test_what_every_evaluation_returns_may_be_the_metric(name):
    check_metric_name(arguments(metric_for_best_model=name), None, has_metrics=False)


def test_without_compute_metrics_any_other_name_is_an_error_with_the_nearest():
    with pytest.raises(ValueError, match=r"='los'.*'eval_loss'.*Did you mean 'loss'\? Pass compute_metrics="):
        check_metric_name(arguments(metric_for_best_model="los"), None, has_metrics=False)
    check_metric_name(arguments(metric_for_best_model="los"), None, has_metrics=True)
    check_metric_name(arguments(metric_for_best_model="los", eval_strategy="no"), None, has_metrics=False)


@pytest.mark.parametrize("name", ["easy_loss", "eval_hard_loss", "hard_runtime"])
def test_one_of_several_sets_may_be_named(name):
    check_metric_name(arguments(metric_for_best_model=name), {"easy": 1, "hard": 2}, has_metrics=False)


def test_with_several_sets_the_name_must_begin_with_one():
    with pytest.raises(ValueError, match=r"one of the evaluation sets \['easy', 'hard'\].*'eval_easy_loss'"):
        check_metric_name(arguments(metric_for_best_model="loss"), {"easy": 1, "hard": 2}, has_metrics=True)


def evaluation(metrics, seen=None):
    def evaluate(batches):
        found = list(batches)
        if seen is not None:
            seen.extend(found)
        return EvalLoopOutput(None, None, metrics, len(found))

    return evaluate


@pytest.mark.parametrize("name", ["accuracy", "eval_accuracy"])
def test_one_batch_is_enough(name):
    seen = []
    rehearse(iter(range(100)), evaluation({"eval_accuracy": 1}, seen), name)
    assert seen == [0]


@pytest.mark.parametrize("metrics", [{"eval_accurracy": 1, "eval_loss": 2}, {}, None])
def test_a_missing_metric_lists_those_there_are(metrics):
    with pytest.raises(ValueError, match=r"'accuracy' is not among the metrics") as caught:
        rehearse([1], evaluation(metrics), "accuracy")
    assert str(sorted(metrics or {})) in str(caught.value)
    assert ("Did you mean 'eval_accurracy'" in str(caught.value)) == bool(metrics)


def test_a_metric_that_fails_on_one_batch_is_only_a_warning(caplog):
    def evaluate(batches):
        raise ZeroDivisionError("only one class")

    with caplog.at_level(logging.WARNING, logger="trainwright.evaluation.rehearsal"):
        rehearse([1], evaluate, "accuracy")
    assert "ZeroDivisionError: only one class" in caplog.text
