"""The values that a model card lists."""

from types import SimpleNamespace

import pytest

from trainwright.hub.card_values import dataset_names, hyperparameters_of, versions
from trainwright.names import OptimizerNames, SchedulerType


def arguments(**changes):
    values = {
        "learning_rate": 5e-5,
        "train_batch_size": 8,
        "eval_batch_size": 16,
        "seed": 42,
        "gradient_accumulation_steps": 1,
        "optim": OptimizerNames.ADAMW_TORCH,
        "optim_args": None,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "lr_scheduler_type": SchedulerType.LINEAR,
        "warmup_steps": 0,
        "max_steps": -1,
        "num_train_epochs": 3.0,
        "bf16": False,
        "fp16": False,
    }
    return SimpleNamespace(**(values | changes))


def test_the_total_batch_counts_processes_and_accumulation():
    listed = hyperparameters_of(arguments(gradient_accumulation_steps=4), num_processes=2)
    assert listed["total_train_batch_size"] == 8 * 4 * 2


def test_what_is_off_is_not_listed():
    listed = hyperparameters_of(arguments())
    assert not {"warmup_steps", "mixed_precision", "total_train_batch_size", "num_processes"} & set(listed)


def test_steps_replace_epochs_where_they_end_the_run():
    listed = hyperparameters_of(arguments(max_steps=100, bf16=True, warmup_steps=10))
    assert (listed["training_steps"], listed["mixed_precision"], listed["warmup_steps"]) == (100, "bf16", 10)
    assert "num_epochs" not in listed


def test_options_are_listed_by_their_plain_names():
    listed = hyperparameters_of(arguments(optim_args="a=1"))
    assert listed["lr_scheduler_type"] == "linear"
    assert listed["optimizer"] == "adamw_torch (betas 0.9 and 0.999, epsilon 1e-08), a=1"
    assert hyperparameters_of(arguments(optim="sgd"))["optimizer"] == "sgd"


def test_only_installed_packages_have_a_version():
    import torch

    assert versions("torch", "no-such-package") == {"torch": str(torch.__version__)}


def test_a_data_set_that_is_not_from_the_hub_has_no_name():
    assert dataset_names([1, 2]) == (None, None)


def test_a_data_set_names_its_builder_unless_that_is_a_file_format():
    datasets = pytest.importorskip("datasets")
    info = datasets.DatasetInfo(builder_name="glue", config_name="mrpc")
    assert dataset_names(datasets.Dataset.from_dict({"x": [1]}, info=info)) == ("glue", "mrpc")
    assert dataset_names(datasets.Dataset.from_dict({"x": [1]})) == (None, None)
    info = datasets.DatasetInfo(builder_name="csv", config_name="default")
    assert dataset_names(datasets.Dataset.from_dict({"x": [1]}, info=info)) == (None, None)
