"""Who reads a metric, what is known of the metrics of an evaluation, and what follows from one that is not there."""

import logging
import types

import pytest
from torch.utils.data import IterableDataset

from trainwright.callbacks.base import TrainerCallback
from trainwright.callbacks.early_stopping import EarlyStoppingCallback
from trainwright.evaluation import sanity_check
from trainwright.names import SaveStrategy, SchedulerType
from trainwright.outputs import EvalLoopOutput


def arguments(**changes):
    values = {
        "metric_for_best_model": "accuracy",
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "save_strategy": SaveStrategy.STEPS,
        "lr_scheduler_type": SchedulerType.LINEAR,
        "prediction_loss_only": False,
        "preflight": True,
    }
    return types.SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"metric_for_best_model": None}, False),
        ({"eval_strategy": "no"}, False),
        ({"load_best_model_at_end": False}, False),
        ({"load_best_model_at_end": False, "save_strategy": "best"}, True),
        ({"load_best_model_at_end": False, "lr_scheduler_type": "reduce_lr_on_plateau"}, True),
        ({"load_best_model_at_end": False, "lr_scheduler_type": SchedulerType.GREEDY}, True),
    ],
)
def test_a_metric_is_needed_where_something_is_chosen_by_it(changes, expected):
    assert sanity_check.needs_metric(arguments(**changes)) == expected


def test_early_stopping_and_a_schedule_need_the_metric_as_well():
    args = arguments(load_best_model_at_end=False)

    def needed_by(args, callbacks=(), waits=False):
        wanted = sanity_check.wanted_metric(args, callbacks, object(), schedule_waits=waits)
        return wanted and (wanted.name, wanted.needed_by)

    assert needed_by(args) == ("accuracy", "")
    assert needed_by(args, [EarlyStoppingCallback()]) == ("accuracy", "EarlyStoppingCallback")
    assert needed_by(args, waits=True) == ("accuracy", "the schedule (object)")
    assert needed_by(arguments(metric_for_best_model=None), waits=True)[0] == "loss"
    assert needed_by(arguments(metric_for_best_model=None)) is None
    assert needed_by(arguments(eval_strategy="no")) is None


def find(name, sets=None, metrics=None, needed_by="somebody", adders=(), classes=(), has_labels=True, seen=None):
    def run(dataset, prefix, compute_metrics, preprocess):
        if seen is not None:
            seen.append((dataset, prefix))
        found = {f"{prefix}_{key}": value for key, value in (compute_metrics(None) if compute_metrics else {}).items()}
        return EvalLoopOutput(None, None, found, 1)

    tried = sanity_check.Tried(run, metrics, None, is_seen=False, has_labels=lambda dataset: has_labels)
    wanted = sanity_check.Wanted(name, needed_by)
    sanity_check.find_metric(wanted, arguments(), sets, tried, adders, classes)


@pytest.mark.parametrize("name", ["loss", "eval_loss", "eval_runtime", "steps_per_second"])
def test_what_every_evaluation_returns_is_not_tried(name):
    find(name)


def test_without_compute_metrics_any_other_name_is_an_error_with_the_nearest():
    with pytest.raises(ValueError, match=r"='los'.*'eval_loss'.*Did you mean 'eval_loss'\? Pass compute_metrics="):
        find("los")


@pytest.mark.parametrize("name", ["easy_loss", "eval_hard_loss", "hard_runtime"])
def test_one_of_several_sets_may_be_named(name):
    find(name, {"easy": 1, "hard": 2})


def test_with_several_sets_the_name_must_begin_with_one():
    with pytest.raises(ValueError, match=r"one of the evaluation sets \['easy', 'hard'\].*'eval_easy_loss'"):
        find("loss", {"easy": 1, "hard": 2}, lambda prediction: {})


def test_only_the_sets_that_may_have_the_metric_are_tried():
    seen = []
    find("eval_hard_accuracy", {"easy": 1, "hard": 2}, lambda prediction: {"accuracy": 1}, seen=seen)
    assert seen == [("hard", "eval_hard")]


@pytest.mark.parametrize("metrics", [{"accurracy": 1, "f1": 2}, {}])
def test_a_missing_metric_lists_those_there_are(metrics):
    with pytest.raises(ValueError, match=r"'accuracy' is not among the metrics") as caught:
        find("accuracy", metrics=lambda prediction: metrics)
    assert all(f"'eval_{name}'" in str(caught.value) for name in [*metrics, "loss"])
    assert ("Did you mean 'eval_accurracy'" in str(caught.value)) == bool(metrics)


def test_a_metric_that_fails_on_one_batch_is_only_a_warning(caplog):
    def fails(prediction):
        raise ZeroDivisionError("only one class")

    with caplog.at_level(logging.WARNING, logger="trainwright.evaluation.sanity_check"):
        find("accuracy", metrics=fails)
    assert "ZeroDivisionError: only one class" in caplog.text


def test_where_a_hook_may_add_it_or_nothing_needs_it_the_error_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="trainwright.evaluation.sanity_check"):
        find("accuracy", needed_by="")
        assert "Nothing in this run depends on it" in caplog.text
        find("accuracy", adders=["Mine.log"])
        assert "Mine.log may add it" in caplog.text and "somebody reads it" in caplog.text


def test_a_loss_without_labels_is_tried():
    with pytest.raises(ValueError, match="'loss'"):
        find("loss", has_labels=False)


class Stream(IterableDataset):
    def __iter__(self):
        yield {"x": 1}


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (None, True),
        ([], True),
        (Stream(), True),
        ([(1, 2)], True),
        ([{"x": 1}], False),
        ([{"x": 1, "labels": 2}], True),
        ([{"x": 1, "label": 2}], True),
    ],
)
def test_labels_are_missed_only_where_a_sample_shows_that_there_are_none(dataset, expected):
    assert sanity_check.seems_labelled(dataset, ["labels"], False) == expected


class Quiet(TrainerCallback):
    def on_log(self, *args, **kwargs):
        """Sees logs only."""


class Loud(Quiet):
    def on_evaluate(self, *args, **kwargs):
        """Sees metrics."""


def test_callbacks_of_the_user_that_see_the_metrics_may_add_some():
    callbacks = [Quiet(), Loud(), EarlyStoppingCallback(), type("Derived", (EarlyStoppingCallback,), {})()]
    assert sanity_check.adding_callbacks(callbacks) == ["Loud.on_evaluate"]
