"""What holds for every tracker: one voice, one start, no training killed by a tracker."""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recorder import Recorder
from trainwright.args.training import TrainingArguments
from trainwright.callbacks.handler import CallbackHandler
from trainwright.interop.environment import EnvironmentValueError, env_choice, env_flag
from trainwright.interop.trackers import ReportTo, Tracker, resolve_report_to
from trainwright.state import TrainerControl, TrainerState
from trainwright.tracking.base import (
    _end_open_runs,
    _open_runs,
    arguments_of,
    group_of,
    numbers_of,
    reporting_callbacks,
    rewrite_logs,
    run_config,
    run_name_of,
    tracked_training,
    without_secrets,
)

ARGS = SimpleNamespace(output_dir="out", run_name="out", to_dict=lambda: {"seed": 1, "hub_token": "hf_secret"})


@pytest.fixture(autouse=True)
def no_open_run():
    yield
    _open_runs.clear()


def tell(callback, event, state=None, **kwargs):
    getattr(callback, event)(ARGS, state or TrainerState(global_step=4), TrainerControl(), model=None, **kwargs)


def words(callback):
    return [what for what, _ in callback.told]


def test_a_run_is_set_up_once_and_told_in_order():
    callback = Recorder()
    tell(callback, "on_train_begin")
    tell(callback, "on_log", logs={"loss": 1.0, "eval_loss": 2.0})
    tell(callback, "on_save")
    tell(callback, "on_train_end")
    assert callback.told == [
        ("setup", None),
        ("log", (4, {"train/loss": 1.0, "eval/loss": 2.0})),
        ("checkpoint", "out/checkpoint-4"),
        ("finish", None),
    ]


def test_a_process_that_is_not_the_first_says_nothing():
    callback = Recorder()
    for event in ("on_train_begin", "on_log", "on_save", "on_predict", "on_train_end"):
        extra = (
            {"logs": {"loss": 1.0}}
            if event == "on_log"
            else {"metrics": {"test_loss": 1.0}}
            if event == "on_predict"
            else {}
        )
        tell(callback, event, TrainerState(is_world_process_zero=False), **extra)
    assert callback.told == []


def test_evaluation_without_training_starts_the_tracker():
    callback = Recorder()
    tell(callback, "on_log", logs={"eval_loss": 2.0})
    assert words(callback) == ["setup", "log"]


def test_metrics_of_predict_are_logged():
    callback = Recorder()
    tell(callback, "on_predict", metrics={"test_loss": 3.0})
    assert callback.told[-1] == ("log", (4, {"test/loss": 3.0}))


def test_a_tracker_that_cannot_start_is_an_error_with_name_cause_and_remedy():
    callback = Recorder()
    callback.fails_in = "setup"
    with pytest.raises(
        RuntimeError, match=r"'kubeflow' could not start: ConnectionError: server unreachable.*report_to"
    ):
        tell(callback, "on_train_begin")


@pytest.mark.parametrize("place", ["log", "checkpoint", "finish"])
def test_a_tracker_that_fails_later_is_switched_off_with_one_warning(place, caplog):
    callback = Recorder()
    callback.fails_in = place
    tell(callback, "on_train_begin")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tell(callback, "on_log", logs={"loss": 1.0})
            tell(callback, "on_save")
            tell(callback, "on_train_end")
    assert len(caplog.records) == 1
    assert "'kubeflow' failed" in caplog.text and "server unreachable" in caplog.text
    assert words(callback)[-1] == place


def test_an_error_that_carries_a_token_is_reported_without_it(monkeypatch, caplog):
    monkeypatch.setenv("SOME_API_KEY", "topsecretvalue")
    callback = Recorder()
    callback._tell = lambda *_: (_ for _ in ()).throw(ConnectionError("denied for topsecretvalue"))
    with pytest.raises(RuntimeError, match="<SOME_API_KEY>") as caught:
        tell(callback, "on_train_begin")
    assert "topsecretvalue" not in str(caught.value)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    assert without_secrets("x topsecretvalue y") == "x <SOME_API_KEY> y"


def train(callback, state=None, error=None):
    """One call of `train()`, as a tracker sees it."""
    with tracked_training(SimpleNamespace(callbacks=[callback])):
        tell(callback, "on_train_begin", state)
        if error is not None:
            raise error
        tell(callback, "on_train_end", state)


def statuses(callback):
    return [status for what, status in callback.told if what == "end"]


class TrialPruned(Exception):
    """As Optuna names it."""


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("x"), "failed"),
        (KeyboardInterrupt(), "killed"),
        (SystemExit(143), "killed"),
        (TrialPruned(), "killed"),
    ],
)
def test_a_training_that_fails_or_is_stopped_ends_its_run_at_once_with_that_status(error, status):
    callback = Recorder()
    with pytest.raises(type(error)):
        train(callback, error=error)
    assert words(callback) == ["setup", "end"] and statuses(callback) == [status]
    _end_open_runs()
    assert statuses(callback) == [status]


def test_a_training_that_fails_before_its_first_event_leaves_the_run_of_the_one_before_as_it_was():
    callback = Recorder()
    train(callback)
    with pytest.raises(ValueError), tracked_training(SimpleNamespace(callbacks=[callback])):
        raise ValueError
    assert statuses(callback) == []
    callback.close()
    assert statuses(callback) == ["finished"]


def test_a_run_stays_open_for_an_evaluation_and_is_finished_when_the_process_ends():
    callback = Recorder()
    train(callback)
    tell(callback, "on_log", logs={"eval_loss": 2.0})
    assert words(callback) == ["setup", "finish", "log"]
    _end_open_runs()
    _end_open_runs()
    assert words(callback) == ["setup", "finish", "log", "end"] and statuses(callback) == ["finished"]


def test_a_fork_does_not_end_the_runs_of_its_parent(monkeypatch):
    train(callback := Recorder())
    child = os.getpid() + 1
    monkeypatch.setattr("os.getpid", lambda: child)
    _end_open_runs()
    train(Recorder())  # which opens a run of its own there
    assert statuses(callback) == []


def test_an_exception_that_ends_the_program_is_seen_on_a_run_that_is_open_then(monkeypatch):
    callback = Recorder()
    train(callback)
    monkeypatch.setattr(sys, "last_value", ValueError("uncaught"), raising=False)
    _end_open_runs()
    assert statuses(callback) == ["failed"]


def test_a_run_that_does_not_stay_open_ends_with_the_training():
    class Measured(Recorder):
        stays_open = False

    callback = Measured()
    train(callback)
    assert words(callback) == ["setup", "finish", "end"]


@pytest.mark.parametrize("same", [True, False], ids=["one Trainer", "two Trainers"])
def test_each_training_has_a_run_of_its_own(same):
    first = Recorder()
    second = first if same else Recorder()
    train(first)
    train(second)
    told = first.told if same else first.told + second.told
    assert [what for what, _ in told] == ["setup", "finish", "end", "setup", "finish"]


def test_an_evaluation_before_a_training_belongs_to_its_run():
    callback = Recorder()
    tell(callback, "on_log", logs={"eval_loss": 2.0})
    train(callback)
    assert words(callback) == ["setup", "log", "finish"]


def test_an_evaluation_after_the_end_of_a_run_continues_it_and_keeps_its_status():
    callback = Recorder()
    callback.id = "run-1"
    with pytest.raises(ValueError):
        train(callback, error=ValueError())
    tell(callback, "on_log", logs={"eval_loss": 2.0})
    callback.close()
    assert [value for what, value in callback.told if what in ("setup", "end")] == [None, "failed", "run-1", "failed"]


def test_a_run_that_cannot_be_opened_again_for_an_evaluation_costs_a_warning(caplog):
    train(callback := Recorder())
    callback.close()
    callback.fails_in = "setup"
    tell(callback, "on_log", logs={"eval_loss": 2.0})
    tell(callback, "on_log", logs={"eval_loss": 2.0})
    assert len(caplog.records) == 1 and "is switched off" in caplog.text
    assert statuses(callback) == ["finished", "failed"]


def test_a_second_attempt_of_a_training_logs_into_the_same_run_what_that_has_not_yet():
    callback = Recorder()
    with tracked_training(SimpleNamespace(callbacks=[callback])):
        tell(callback, "on_train_begin", TrainerState())
        for step in (1, 2):
            tell(callback, "on_log", TrainerState(global_step=step), logs={"loss": float(step)})
        tell(callback, "on_train_begin", TrainerState(global_step=1))
        for step in (2, 3):
            tell(callback, "on_log", TrainerState(global_step=step), logs={"loss": float(step)})
    assert [value[0] for what, value in callback.told if what == "log"] == [1, 2, 3]
    assert words(callback).count("setup") == 1


def test_a_run_of_the_user_is_not_ended():
    callback = Recorder()
    callback.opens_run = False
    train(callback)
    with pytest.raises(ValueError):
        train(callback, error=ValueError())
    _end_open_runs()
    assert words(callback) == ["setup", "finish", "setup"]


def test_a_start_that_fails_after_the_run_was_opened_ends_it_as_failed():
    callback = Recorder()
    callback.fails_in = "setup"
    with pytest.raises(RuntimeError, match="could not start"):
        train(callback)
    assert statuses(callback) == ["failed"]


def test_a_tracker_that_nobody_named_may_not_end_a_training(caplog):
    callback = Recorder()
    callback.fails_in = "setup"
    args = SimpleNamespace(**vars(ARGS), report_to=resolve_report_to("all"))
    args.report_to.unasked = frozenset(["kubeflow"])
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    callback.on_log(args, TrainerState(), TrainerControl(), logs={"loss": 1.0})
    assert words(callback) == ["setup", "end"]
    assert "kubeflow" in caplog.text and 'report_to="none"' in caplog.text and len(caplog.records) == 1


def test_a_tracker_that_nobody_named_may_not_end_the_construction_of_a_trainer_either(monkeypatch, caplog):
    monkeypatch.setenv("WANDB_LOG_MODEL", "chekpoint")
    monkeypatch.setattr(Tracker, "missing", None)
    names = ReportTo(["wandb"])
    with pytest.raises(EnvironmentValueError):
        CallbackHandler(reporting_callbacks(names), None, None, None, None)
    names.unasked = frozenset(names)
    assert reporting_callbacks(names) == []
    assert "'wandb'" in caplog.text and "chekpoint" in caplog.text and 'report_to="none"' in caplog.text


def test_a_tracker_that_hangs_when_it_is_closed_is_left_after_a_limit(caplog):
    release = threading.Event()

    class Hanging(Recorder):
        end_limit_s = 0.01

        def end(self, status):
            release.wait()

    train(callback := Hanging())
    callback.close()
    release.set()
    assert "takes longer than 0.01 s" in caplog.text and "finished" in caplog.text


def test_a_tracker_that_fails_when_it_is_closed_costs_a_warning(caplog):
    callback = Recorder()
    callback.fails_in = "end"
    with pytest.raises(ValueError):  # not the ConnectionError
        train(callback, error=ValueError())
    assert "could not be ended as failed" in caplog.text and "server unreachable" in caplog.text


def test_each_trial_of_a_search_is_a_run_of_its_own_even_after_one_that_broke():
    callback = Recorder()
    trial = TrainerState(is_hyper_param_search=True)
    train(callback, trial)
    with pytest.raises(ValueError):
        train(callback, trial, ValueError())
    train(callback, trial)
    assert words(callback) == ["setup", "finish", "end", "setup", "end", "setup", "finish"]
    assert statuses(callback) == ["finished", "failed"]


def resumable(directory, step=0, training="t"):
    state = TrainerState(global_step=step)
    state.places_of_checkpoints, state.training_id = (str(directory),), training
    return state


def crashed(directory):
    """A training that logged steps 1 and 2, of step 2 no evaluation, and then crashed."""
    callback = Recorder()
    callback.id = "run-1"
    tell(callback, "on_train_begin", resumable(directory))
    for step in (1, 2):
        tell(callback, "on_log", resumable(directory, step), logs={"loss": 1.0, "epoch": 1})
    _open_runs.clear()


def test_a_training_resumed_after_a_crash_continues_its_run_and_repeats_no_point(tmp_path):
    crashed(tmp_path)
    callback = Recorder()
    callback.id = "run-1"
    tell(callback, "on_train_begin", resumable(tmp_path, 1))
    tell(callback, "on_log", resumable(tmp_path, 2), logs={"loss": 1.0, "epoch": 1})
    tell(callback, "on_log", resumable(tmp_path, 2), logs={"eval_loss": 1.0, "epoch": 1})
    tell(callback, "on_log", resumable(tmp_path, 3), logs={"loss": 1.0})
    assert callback.told == [("setup", "run-1"), ("log", (2, {"eval/loss": 1.0})), ("log", (3, {"train/loss": 1.0}))]


@pytest.mark.parametrize("kind", ["another training", "a fresh start", "another run", "damaged"])
def test_what_does_not_continue_a_run_logs_every_line(tmp_path, kind):
    crashed(tmp_path)
    callback = Recorder()
    callback.id = "run-2" if kind == "another run" else "run-1"
    step = 0 if kind == "a fresh start" else 1
    if kind == "damaged":
        (tmp_path / "tracker_runs" / "kubeflow.json").write_text("{")
    tell(callback, "on_train_begin", resumable(tmp_path, step, "u" if kind == "another training" else "t"))
    tell(callback, "on_log", resumable(tmp_path, 2), logs={"loss": 1.0})
    assert callback.told == [("setup", "run-1" if kind == "another run" else None), ("log", (2, {"train/loss": 1.0}))]


def test_what_a_tracker_refuses_is_named_once_and_the_rest_arrives(caplog):
    class Picky(Recorder):
        def log_metrics(self, metrics, state):
            if "train/bad//name" in metrics:
                raise ValueError("invalid name")
            super().log_metrics(metrics, state)

    callback = Picky()
    for _ in range(2):
        tell(callback, "on_log", logs={"loss": 1.0, "bad//name": 2.0})
    assert [value for what, value in callback.told if what == "log"] == [(4, {"train/loss": 1.0})] * 2
    assert len(caplog.records) == 1 and "bad//name" in caplog.text and "invalid name" in caplog.text


def test_an_override_of_setup_without_keyword_arguments_is_called_with_what_it_takes():
    class Older(Recorder):
        def setup(self, args, state, model):
            self._tell("setup")

    callback = Older()
    tell(callback, "on_train_begin", processing_class="tokenizer")
    assert words(callback) == ["setup"]


def test_only_numbers_reach_a_tracker_of_numbers_and_the_rest_is_named(caplog):
    callback = Recorder()
    with caplog.at_level(logging.WARNING):
        tell(callback, "on_log", logs={"loss": 1.0, "note": "text"})
    assert callback.told[-1] == ("log", (4, {"train/loss": 1.0}))
    assert "note" in caplog.text


def test_names_are_grouped_by_the_part_of_training():
    logs = {"loss": 1, "train_runtime": 2, "eval_loss": 3, "eval_squad_f1": 4, "test_loss": 5, "evaluation": 6}
    assert rewrite_logs(logs) == {
        "train/loss": 1,
        "train/train_runtime": 2,
        "eval/loss": 3,
        "eval/squad_f1": 4,
        "test/loss": 5,
        "train/evaluation": 6,
    }


def test_numbers_are_read_out_of_arrays_and_tensors_with_one_element():
    logs = {"a": 1, "b": np.float32(2.5), "c": torch.tensor([3.5]), "d": torch.ones(2), "e": "text", "f": None}
    assert numbers_of(logs) == {"a": 1, "b": 2.5, "c": 3.5}


def test_the_configuration_holds_model_arguments_and_trial_without_tokens():
    model = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"hidden_size": 8}))
    state = TrainerState(trial_params={"seed": 7})
    assert run_config(ARGS, state, model) == {"hidden_size": 8, "seed": 7, "hub_token": "<HUB_TOKEN>"}
    assert "hf_secret" not in str(arguments_of(ARGS))


@pytest.mark.parametrize("sanitized", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token"])
def test_a_token_reaches_no_tracker_under_either_of_its_names(name, sanitized):
    args = TrainingArguments("out", report_to="none", **{name: "hf_secret"})
    assert args.hub_token == "hf_secret"
    plain = SimpleNamespace(to_dict=lambda: {"seed": 1, name: "hf_secret"})  # as another library's arguments give it
    for given in (args, plain):
        assert "hf_secret" not in str(run_config(given, TrainerState(), None, sanitized))


def test_the_run_name_is_the_trial_or_what_the_user_chose():
    chosen = SimpleNamespace(output_dir="out", run_name="mine")
    assert run_name_of(ARGS, TrainerState()) is None
    assert run_name_of(chosen, TrainerState()) == "mine"
    assert run_name_of(chosen, TrainerState(trial_name="trial-3")) == "trial-3"


def test_trials_without_names_are_called_after_their_directories_and_share_a_group():
    chosen, names = SimpleNamespace(output_dir="out", run_name="mine"), []
    for number in (0, 1):
        state = TrainerState(is_hyper_param_search=True)
        state.places_of_checkpoints = (f"out/run-{number}",)
        names.append(run_name_of(chosen, state))
        assert group_of(chosen, state) == "mine" and group_of(ARGS, state) == "out"
        assert run_name_of(ARGS, state) == f"run-{number}"
    assert names == ["mine-run-0", "mine-run-1"]
    assert group_of(chosen, TrainerState()) is None


def test_a_variable_that_is_neither_true_nor_false_is_named(monkeypatch):
    monkeypatch.setenv("HF_FLAG", "yep")
    with pytest.raises(EnvironmentValueError, match="HF_FLAG='yep' must be TRUE or FALSE"):
        env_flag("HF_FLAG")
    monkeypatch.setenv("HF_FLAG", "True")
    assert env_flag("HF_FLAG") is True
    assert env_flag("HF_OTHER", default=True) is True


def test_a_variable_with_few_values_lists_them_and_the_nearest(monkeypatch):
    monkeypatch.setenv("HF_CHOICE", "chekpoint")
    with pytest.raises(EnvironmentValueError, match=r"'end', 'checkpoint'.*Did you mean 'checkpoint'"):
        env_choice("HF_CHOICE", ("end", "checkpoint"), "end")
