"""Which engine arguments and environment ask for."""

from types import SimpleNamespace

import pytest

from trainwright.parallel.engine_choice import asked_engine

VARIABLES = ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def asked(monkeypatch, fsdp=(), deepspeed=None, **environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return asked_engine(SimpleNamespace(fsdp=list(fsdp), deepspeed=deepspeed))


def test_without_a_word_the_number_of_processes_decides(monkeypatch):
    assert asked(monkeypatch) == "plain"
    assert asked(monkeypatch, ACCELERATE_USE_FSDP="false") == "plain"
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert asked(monkeypatch, WORLD_SIZE="2", **ranks) == "ddp"


def test_arguments_and_accelerate_launch_ask_for_an_engine(monkeypatch):
    assert asked(monkeypatch, fsdp=["full_shard"]) == "fsdp"
    assert asked(monkeypatch, deepspeed={"zero_optimization": {}}) == "deepspeed"
    assert asked(monkeypatch, ACCELERATE_USE_FSDP="true") == "fsdp"
    assert asked(monkeypatch, fsdp=["full_shard"]) == "fsdp"  # both say the same
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert asked(monkeypatch, ACCELERATE_USE_DEEPSPEED="true") == "deepspeed"


@pytest.mark.parametrize(("config", "is_said"), [({"min_num_params": 5}, True), ({}, False), (None, False)])
def test_settings_of_fsdp_without_fsdp_are_said_to_shard_nothing(make_trainer, caplog, config, is_said):
    make_trainer(fsdp_config=config)
    assert ("fsdp_config has settings, but fsdp is not set, so nothing is sharded" in caplog.text) == is_said


def test_two_engines_at_once_are_an_error_that_names_who_asks(monkeypatch):
    with pytest.raises(ValueError, match=r"^fsdp and ACCELERATE_USE_DEEPSPEED=true .* ask for two engines"):
        asked(monkeypatch, fsdp=["full_shard"], ACCELERATE_USE_DEEPSPEED="true")


def test_an_engine_that_nobody_here_has_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="Megatron-LM"):
        asked(monkeypatch, ACCELERATE_USE_MEGATRON_LM="true")
