"""What holds for every tracker: one voice, one start, no training killed by a tracker."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from trainwright.args.training import TrainingArguments
from trainwright.interop.environment import EnvironmentValueError, env_choice, env_flag
from trainwright.state import TrainerControl, TrainerState
from trainwright.tracking.base import (
    TrackerCallback,
    arguments_of,
    numbers_of,
    rewrite_logs,
    run_config,
    run_name_of,
    without_secrets,
)
from trainwright.tracking.mlflow import MLflowCallback

ARGS = SimpleNamespace(output_dir="out", run_name="out", to_dict=lambda: {"seed": 1, "hub_token": "hf_secret"})


class Recorder(TrackerCallback):
    """A tracker that keeps what it is told; it fails where `fails_in` says."""

    tracker_name = "kubeflow"  # needs no package
    fails_in = ""

    def __init__(self) -> None:
        super().__init__()
        self.told: list = []

    def _tell(self, what, value=None):
        self.told.append((what, value))
        if self.fails_in == what:
            raise ConnectionError("server unreachable")

    def setup(self, args, state, model, **kwargs):
        self._tell("setup")

    def log_metrics(self, metrics, state):
        self._tell("log", (state.global_step, metrics))

    def log_checkpoint(self, directory, args, state):
        self._tell("checkpoint", str(directory))

    def finish(self, args, state, model, **kwargs):
        self._tell("finish")

    def close(self):
        self._tell("close")


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


def test_each_trial_of_a_search_is_a_run_of_its_own_even_after_one_that_broke():
    callback = Recorder()
    trial = TrainerState(is_hyper_param_search=True)
    tell(callback, "on_train_begin", trial)
    tell(callback, "on_train_end", trial)
    tell(callback, "on_train_begin", trial)  # this one never ends
    tell(callback, "on_train_begin", trial)
    assert words(callback) == ["setup", "finish", "close", "setup", "close", "setup"]


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


def test_mlflow_gets_nested_settings_flat_only_where_asked_for(monkeypatch):
    """Without the package: what it would be given is held here also where the tests of real trackers are skipped."""
    validation = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=2)
    for name in ("mlflow", "mlflow.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "mlflow.utils.validation", validation)
    values = {"a": {"b": {"c": 1}, "d": 2}, "empty": {}, "seed": 3, "known": 4}

    def logged(flatten):
        monkeypatch.setenv("MLFLOW_FLATTEN_PARAMS", flatten)
        params, callback = {}, MLflowCallback.__new__(MLflowCallback)
        callback._ml_flow = SimpleNamespace(log_params=params.update)
        callback._log_params(values, already={"known": "4"})
        return params

    assert logged("1") == {"a.b.c": 1, "a.d": 2, "empty": {}, "seed": 3}
    assert logged("0") == {"a": {"b": {"c": 1}, "d": 2}, "empty": {}, "seed": 3}


def test_the_run_name_is_the_trial_or_what_the_user_chose():
    chosen = SimpleNamespace(output_dir="out", run_name="mine")
    assert run_name_of(ARGS, TrainerState()) is None
    assert run_name_of(chosen, TrainerState()) == "mine"
    assert run_name_of(chosen, TrainerState(trial_name="trial-3")) == "trial-3"


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
