"""When patience runs out."""

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest

from trainwright.callbacks.early_stopping import EarlyStoppingCallback
from trainwright.names import IntervalStrategy
from trainwright.state import TrainerControl, TrainerState


def arguments(**changes: Any) -> SimpleNamespace:
    settings: dict[str, Any] = {
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "eval_strategy": IntervalStrategy.STEPS,
        "load_best_model_at_end": True,
    }
    return SimpleNamespace(**{**settings, **changes})


def started(callback: Any, args: Any, **fields: Any) -> TrainerState:
    state = TrainerState(**fields)
    callback.on_train_begin(args, state, TrainerControl())
    return state


def stops(callback: Any, args: Any, state: TrainerState, metrics: dict[str, float], step: int | None = None) -> bool:
    """Whether an evaluation with `metrics` ends training."""
    state.global_step = state.global_step + 1 if step is None else step
    control = TrainerControl()
    callback.on_evaluate(args, state, control, metrics=metrics)
    return control.should_training_stop


def counts(values: list[float], callback: EarlyStoppingCallback, **changes: Any) -> list[int]:
    """The patience used up after each of `values`."""
    args = arguments(**changes)
    state, used = started(callback, args), []
    for value in values:
        stops(callback, args, state, {"eval_loss": value})
        used.append(callback.early_stopping_patience_counter)
    return used


def test_training_stops_after_as_many_evaluations_without_improvement_as_patience_allows() -> None:
    callback, args = EarlyStoppingCallback(2), arguments()
    state = started(callback, args)
    assert [stops(callback, args, state, {"eval_loss": v}) for v in (3, 2, 2.5, 1.9, 2, 2.1)] == [False] * 5 + [True]


def test_a_gain_up_to_the_threshold_uses_up_patience_and_still_becomes_the_value_to_beat() -> None:
    # From 3.0 to 2.4 is more than the threshold; from 2.75, the value to beat, it is not.
    assert counts([3.0, 2.75, 2.4, 1.5], EarlyStoppingCallback(9, 0.5)) == [0, 1, 2, 0]
    rising = [-3.0, -2.75, -2.4, -1.5]
    assert counts(rising, EarlyStoppingCallback(9, 0.5), greater_is_better=True) == [0, 1, 2, 0]
    assert counts([3.0, 2.5, 1.75], EarlyStoppingCallback(9, 0.5)) == [0, 1, 0]  # exactly the threshold is no more


def test_greater_is_better_turns_the_direction_and_is_told_from_the_name_when_not_given() -> None:
    values = [1.0, 2.0, 3.0, 2.0]
    assert counts(values, EarlyStoppingCallback(9), greater_is_better=True) == [0, 0, 0, 1]
    for name, used in (("loss", [0, 1, 2, 3]), ("eval_val_loss", [0, 1, 2, 3]), ("score", [0, 0, 0, 1])):
        callback, args = EarlyStoppingCallback(9), arguments(metric_for_best_model=name, greater_is_better=None)
        state, found = started(callback, args), []
        for value in values:
            stops(callback, args, state, {"eval_" + name.removeprefix("eval_"): value})
            found.append(callback.early_stopping_patience_counter)
        assert found == used, name


def test_nan_is_no_improvement_even_as_the_first_value() -> None:
    assert counts([math.nan, 3.0, math.nan, 2.0], EarlyStoppingCallback(9)) == [1, 0, 1, 0]


@pytest.mark.parametrize("rises", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_patience_is_counted_as_in_the_reference(threshold: float, rises: bool) -> None:
    reference = pytest.importorskip("transformers.trainer_callback")
    values = [1.0, 0.9, 0.65, 0.65, 0.7, 0.1, 1.5, 1.6, 2.2, 0.0]
    theirs = reference.EarlyStoppingCallback(9, threshold)
    args, state, used = arguments(greater_is_better=rises), reference.TrainerState(), []
    for value in values:
        theirs.on_evaluate(args, state, reference.TrainerControl(), metrics={"eval_loss": value})
        used.append(theirs.early_stopping_patience_counter)
        if state.best_metric is None or (value > state.best_metric if rises else value < state.best_metric):
            state.best_metric = value  # the Trainer does this, after the event
    assert counts(values, EarlyStoppingCallback(9, threshold), greater_is_better=rises) == used


def test_the_metric_is_found_with_or_without_its_prefix() -> None:
    for name in ("f1", "eval_f1"):
        callback, args = EarlyStoppingCallback(1), arguments(metric_for_best_model=name, greater_is_better=True)
        state = started(callback, args)
        assert [stops(callback, args, state, {"eval_f1": value}) for value in (0.5, 0.4)] == [False, True]


def test_an_evaluation_outside_training_uses_up_no_patience() -> None:
    callback, args = EarlyStoppingCallback(1), arguments()
    assert not stops(callback, args, TrainerState(), {"eval_loss": 9.0})
    state = started(callback, args)
    stops(callback, args, state, {"eval_loss": 1.0})
    callback.on_train_end(args, state, TrainerControl())
    assert not stops(callback, args, state, {"eval_loss": 9.0})
    assert callback.early_stopping_patience_counter == 0


def test_a_step_counts_once_however_often_it_is_evaluated() -> None:
    callback, args = EarlyStoppingCallback(2), arguments()
    state = started(callback, args)
    stops(callback, args, state, {"eval_loss": 1.0}, step=1)
    assert [stops(callback, args, state, {"eval_loss": 2.0}, step=2) for _ in range(3)] == [False] * 3
    assert stops(callback, args, state, {"eval_loss": 2.0}, step=3)


def test_of_several_evaluation_datasets_the_one_with_the_metric_counts(caplog: pytest.LogCaptureFixture) -> None:
    callback, args = EarlyStoppingCallback(2), arguments(metric_for_best_model="eval_b_loss")
    state = started(callback, args)
    stopped = []
    for step in (1, 2, 3):
        stopped.append(stops(callback, args, state, {"eval_a_loss": 5.0}, step=step))
        stopped.append(stops(callback, args, state, {"eval_b_loss": 5.0}, step=step))
    callback.on_train_end(args, state, TrainerControl())
    assert stopped == [False] * 5 + [True]
    assert caplog.text == ""


@pytest.mark.parametrize("num_evaluations", [1, 3])
def test_a_metric_that_no_evaluation_has_is_warned_about_once(num_evaluations: int, caplog: Any) -> None:
    callback, args = EarlyStoppingCallback(1), arguments(metric_for_best_model="acuracy")
    state = started(callback, args)
    for _ in range(num_evaluations):
        stops(callback, args, state, {"eval_accuracy": 0.5, "eval_loss": 1.0})
    callback.on_train_end(args, state, TrainerControl())
    assert len(caplog.records) == 1
    assert "no evaluation has 'eval_acuracy'" in caplog.text and "eval_accuracy, eval_loss" in caplog.text
    assert "Did you mean 'eval_accuracy'" in caplog.text


def test_a_missing_metric_name_or_a_run_without_evaluations_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="metric_for_best_model, which is None"):
        started(EarlyStoppingCallback(), arguments(metric_for_best_model=None))
    with pytest.raises(ValueError, match='eval_strategy is "no"'):
        started(EarlyStoppingCallback(), arguments(eval_strategy=IntervalStrategy.NO))


def test_not_loading_the_best_model_at_the_end_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        started(EarlyStoppingCallback(), arguments(load_best_model_at_end=False))
    assert "without load_best_model_at_end=True" in caplog.text


def test_a_fresh_run_starts_with_full_patience_and_a_resumed_one_keeps_what_it_had() -> None:
    callback, args = EarlyStoppingCallback(5), arguments()
    state = started(callback, args)
    for value in (1.0, 2.0, 3.0):
        stops(callback, args, state, {"eval_loss": value})
    resumed = EarlyStoppingCallback.from_state(callback.state())
    started(resumed, args, global_step=3, best_metric=1.0)
    assert (resumed.early_stopping_patience_counter, resumed.best_value) == (2, 1.0)
    started(callback, args)
    assert (callback.early_stopping_patience_counter, callback.best_value) == (0, None)


def test_a_new_callback_in_a_resumed_run_takes_the_best_value_from_the_state() -> None:
    callback, args = EarlyStoppingCallback(1), arguments()
    state = started(callback, args, global_step=7, best_metric=0.5)
    assert stops(callback, args, state, {"eval_loss": 0.6})


def test_its_state_holds_the_names_that_the_reference_reads() -> None:
    reference = pytest.importorskip("transformers.trainer_callback")
    ours, theirs = EarlyStoppingCallback(3, 0.1).state(), reference.EarlyStoppingCallback(3, 0.1).state()
    assert ours["args"] == theirs["args"]
    assert theirs["attributes"].items() <= ours["attributes"].items()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"early_stopping_patience": -1}, ValueError, "early_stopping_patience must be at least 0"),
        (
            {"early_stopping_patience": 1.5},
            TypeError,
            "early_stopping_patience must be a number of evaluations, not 1.5",
        ),
        ({"early_stopping_threshold": -0.1}, ValueError, "early_stopping_threshold must be a number of at least 0"),
        ({"early_stopping_threshold": "0.1"}, ValueError, "early_stopping_threshold must be a number of at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        EarlyStoppingCallback(**settings)


def test_a_threshold_of_none_means_any_gain_and_a_patience_of_zero_the_first_evaluation() -> None:
    assert EarlyStoppingCallback(1, None).early_stopping_threshold == 0.0
    callback, args = EarlyStoppingCallback(0), arguments()
    assert stops(callback, args, started(callback, args), {"eval_loss": 1.0})
