"""The default search spaces and the default objective."""

import optuna
import pytest

from trainwright.search import spaces


def test_the_evaluation_loss_is_the_objective_where_there_is_no_other_metric():
    metrics = {"eval_loss": 0.5, "epoch": 3.0, "eval_runtime": 9.0, "eval_samples_per_second": 8.0}
    assert spaces.default_compute_objective(metrics) == 0.5


def test_all_other_metrics_are_added_where_there_are_some():
    metrics = {"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_f1": 0.25, "epoch": 3.0}
    assert spaces.default_compute_objective(metrics) == 0.75 + 0.25


@pytest.mark.parametrize(
    "name",
    [
        "epoch",
        "eval_runtime",
        "eval_steps_per_second",
        "eval_tokens_per_second",
        "eval_jit_compilation_time",
        "eval_model_preparation_time",
        "eval_mem_cpu_alloc_delta",
        "eval_mem_gpu_peaked_delta",
        "before_init_mem_cpu",
    ],
)
def test_times_speeds_and_memory_are_no_metrics(name):
    assert spaces.default_compute_objective({"eval_loss": 0.5, name: 100.0}) == 0.5


@pytest.mark.parametrize("name", ["eval_memorised", "eval_runtime_error_rate", "eval_time", "eval_NaN_loss"])
def test_a_metric_with_a_similar_name_counts(name):
    assert spaces.default_compute_objective({"eval_loss": 0.5, name: 100.0}) == 100.0


def test_the_metrics_are_left_as_they_are():
    metrics = {"eval_loss": 0.5, "eval_f1": 0.25, "epoch": 1.0}
    spaces.default_compute_objective(metrics)
    assert metrics == {"eval_loss": 0.5, "eval_f1": 0.25, "epoch": 1.0}


def test_an_evaluation_without_loss_and_metrics_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"nothing to optimise.*eval_runtime.*compute_objective="):
        spaces.default_compute_objective({"eval_runtime": 1.0})


def test_the_optuna_space_stays_in_the_documented_ranges():
    trial = optuna.create_study().ask()
    params = spaces.default_hp_space_optuna(trial)
    assert params == trial.params
    found = trial.distributions
    assert found["learning_rate"] == optuna.distributions.FloatDistribution(1e-6, 1e-4, log=True)
    assert found["num_train_epochs"] == optuna.distributions.IntDistribution(1, 5)
    assert found["seed"] == optuna.distributions.IntDistribution(1, 40)
    assert found["per_device_train_batch_size"].choices == (4, 8, 16, 32, 64)


def test_every_space_searches_the_same_four_arguments():
    names = {"learning_rate", "num_train_epochs", "seed", "per_device_train_batch_size"}
    assert set(spaces.default_hp_space_optuna(optuna.create_study().ask())) == names
    assert set(spaces.default_hp_space_wandb(None)["parameters"]) == names
    assert {parameter["name"] for parameter in spaces.default_hp_space_sigopt(None)} == names


def test_the_ray_space_samples_whole_numbers_where_the_argument_is_one():
    pytest.importorskip("ray.tune")
    space = spaces.default_hp_space_ray(None)
    samples = [space["seed"].sample() for _ in range(200)]
    assert all(float(seed).is_integer() and 1 <= seed <= 40 for seed in samples)
    assert space["num_train_epochs"].categories == [1, 2, 3, 4, 5]
    assert 1e-6 <= space["learning_rate"].sample() <= 1e-4


def test_the_ray_space_names_the_pip_command_where_ray_is_missing():
    from trainwright.interop.optional import MissingExtra, is_installed

    if is_installed("ray"):
        pytest.skip("ray is installed")
    with pytest.raises(MissingExtra, match=r"pip install 'trainwright\[ray\]'"):
        spaces.default_hp_space_ray(None)
