"""Documented functions that scripts import: what they return."""

import argparse
import os

import numpy as np
import pytest
import torch

from trainwright import TensorBoardCallback
from trainwright.compat import free_functions as functions
from trainwright.compat.older_adamw import AdamW
from trainwright.compat.replaced_names import OF_PACKAGES, REPLACED, ours
from trainwright.interop.trackers import TRACKERS


def test_every_entry_of_the_table_is_found():
    places = [where for names in (*REPLACED.values(), *OF_PACKAGES.values()) for where in names.values()]
    lazily = [where for where in places if "compat.installed_defaults" in where]  # needs the installed transformers
    assert all(ours(where) is not None for where in places if where not in lazily)
    assert len(lazily) == 2


@pytest.mark.parametrize("word, value", [("yes", True), ("ON", True), ("0", False), ("off", False)])
def test_words_for_true_and_false_are_read(word, value):
    assert functions.str_to_bool(word) is value
    assert functions.str_to_bool(word, to_bool=False) == int(value)


def test_any_other_word_is_an_error_of_its_kind():
    with pytest.raises(ValueError, match="'maybe' is neither"):
        functions.str_to_bool("maybe")
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe' is neither"):
        functions.string_to_bool("maybe")
    assert functions.string_to_bool(True) and not functions.string_to_bool("f")


def test_a_number_is_read_from_the_first_variable_that_has_one(monkeypatch):
    monkeypatch.setenv("SECOND", "3")
    assert functions.get_int_from_env(["FIRST_THAT_IS_UNSET", "SECOND"], 7) == 3
    assert functions.get_int_from_env(["FIRST_THAT_IS_UNSET"], 7) == 7


def test_a_choice_is_found_by_its_text():
    choose = functions.make_choice_type_function([1, "b"])
    assert choose("1") == 1 and choose("b") == "b" and choose("c") == "c"


def test_tables_of_trackers_follow_the_registry():
    assert list(functions.INTEGRATION_TO_CALLBACK) == list(TRACKERS)
    assert len(functions.INTEGRATION_TO_CALLBACK) == len(TRACKERS)
    assert functions.INTEGRATION_TO_CALLBACK["tensorboard"] is TensorBoardCallback
    assert "nothing" not in functions.INTEGRATION_TO_CALLBACK


def test_metrics_are_formatted_with_and_without_a_trainer_before_them():
    metrics = {"train_loss": 0.5, "train_runtime": 60.0}
    assert functions.metrics_format(metrics) == functions.metrics_format(object(), metrics)


def test_the_default_log_directory_is_below_runs():
    assert functions.default_logdir().startswith("runs" + os.sep)


def test_a_search_of_a_backend_is_the_trainers_own():
    class Searching:
        def hyperparameter_search(self, **kwargs):
            return kwargs

    found = functions.run_hp_search_optuna(Searching(), 3, "minimize", timeout=1)
    assert found == {"n_trials": 3, "direction": "minimize", "backend": "optuna", "timeout": 1}


def test_the_older_adamw_steps_as_torchs_with_its_own_defaults():
    weights = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    older = AdamW([weights[0]], no_deprecation_warning=True)
    plain = torch.optim.AdamW([weights[1]], lr=1e-3, eps=1e-6, weight_decay=0.0)
    for weight, optimizer in zip(weights, (older, plain), strict=True):
        weight.grad = torch.tensor([0.3, -0.1])
        optimizer.step()
    np.testing.assert_array_equal(*(weight.detach().numpy() for weight in weights))
    with pytest.raises(ValueError, match="correct_bias=False"):
        AdamW(weights, correct_bias=False)
