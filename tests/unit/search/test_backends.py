"""Choosing a search engine, and what all engines check alike."""

import pickle

import optuna
import pytest

from trainwright.interop.optional import is_installed
from trainwright.names import HPSearchBackend
from trainwright.search import backends


def test_the_first_installed_engine_is_optuna():
    assert backends.choose_backend().__name__ == "trainwright.search.optuna"


@pytest.mark.parametrize("name", ["optuna", HPSearchBackend.OPTUNA])
def test_an_engine_is_chosen_by_name_or_member(name):
    assert backends.choose_backend(name).__name__ == "trainwright.search.optuna"


def test_an_unknown_engine_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'optun' is not a valid.*'optuna'"):
        backends.choose_backend("optun")


@pytest.mark.parametrize("name", ["ray", "wandb"])
def test_an_engine_that_is_not_installed_names_its_pip_command(name):
    if is_installed(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(RuntimeError, match=rf"pip install 'trainwright\[{name}\]'"):
        backends.choose_backend(name)


def test_where_no_engine_is_installed_every_pip_command_is_named(monkeypatch):
    monkeypatch.setattr(backends, "is_installed", lambda module: False)
    with pytest.raises(RuntimeError) as caught:
        backends.choose_backend()
    for command in backends.PIP_COMMANDS.values():
        assert command in str(caught.value)


def test_every_engine_defines_what_the_trainer_calls():
    for name in ("optuna", "ray", "sigopt", "wandb"):
        module = __import__(f"trainwright.search.{name}", fromlist=["run"])
        for function in ("default_hp_space", "params_of", "report", "run"):
            assert callable(getattr(module, function))


def test_sigopt_says_that_its_service_is_gone():
    engine = backends.choose_backend("sigopt")
    with pytest.raises(RuntimeError, match=r"shut down.*optuna"):
        engine.run(lambda trial: 0.0, 1, "minimize")


def test_a_wrong_direction_is_an_error_with_the_nearest_word():
    with pytest.raises(ValueError, match=r"'minimise' must be .* Did you mean 'minimize'"):
        backends.check_directions("minimise")


def test_several_directions_are_for_optuna_only():
    assert backends.check_directions(["minimize", "maximize"], several=True) == ["minimize", "maximize"]
    with pytest.raises(ValueError, match="backend='optuna'"):
        backends.check_directions(["minimize", "maximize"])


def test_a_trial_is_named_by_its_engine():
    assert backends.trial_id(backends.NamedTrial({"seed": 1}, "abc_00001")) == "abc_00001"
    assert backends.trial_id(optuna.create_study().ask()) == "0"


def test_a_named_trial_keeps_its_name_when_it_travels_to_another_process():
    trial = pickle.loads(pickle.dumps(backends.NamedTrial({"seed": 1}, "abc")))
    assert (dict(trial), trial.run_id) == ({"seed": 1}, "abc")
