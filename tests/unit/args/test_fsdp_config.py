"""How FSDP is asked for: words, keys, names of version 1, and the environment of `accelerate launch`."""

import logging

import pytest

from trainwright.args.fsdp_config import FsdpConfig
from trainwright.names import FSDPOption


def parsed(*words, **keys):
    return FsdpConfig.parse([FSDPOption(word) for word in words], keys)


@pytest.mark.parametrize(
    ("words", "keys", "expected"),
    [
        (["full_shard"], {}, {"reshard_after_forward": True}),
        (["shard_grad_op"], {}, {"reshard_after_forward": False}),
        (["hybrid_shard", "auto_wrap"], {}, {"replicates_over_nodes": True, "reshard_after_forward": True}),
        (["hybrid_shard_zero2"], {}, {"replicates_over_nodes": True, "reshard_after_forward": False}),
        (["full_shard", "offload"], {}, {"offload_params": True}),
        ([], {"fsdp_offload_params": True}, {"offload_params": True}),
        ([], {"cpu_offload": True}, {"offload_params": True}),
        ([], {"sharding_strategy": 2}, {"reshard_after_forward": False}),
        ([], {"sharding_strategy": "HYBRID_SHARD"}, {"replicates_over_nodes": True}),
        ([], {"fsdp_reshard_after_forward": "SHARD_GRAD_OP"}, {"reshard_after_forward": False}),
        ([], {"fsdp_reshard_after_forward": False}, {"reshard_after_forward": False}),
        ([], {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}, {"auto_wrap_policy": "transformer_based_wrap"}),
        ([], {"transformer_cls_to_wrap": "A, B"}, {"transformer_layer_cls_to_wrap": ["A", "B"]}),
        ([], {"min_num_params": 1e6}, {"min_num_params": 1_000_000}),
        ([], {"state_dict_type": "SHARDED_STATE_DICT"}, {"state_dict_type": "sharded_state_dict"}),
        ([], {"version": 1, "use_orig_params": True, "limit_all_gathers": False}, {"version": 1}),
        ([], {"xla": False, "xla_fsdp_v2": False}, {}),
        ([], {"activation_checkpointing": 1}, {"activation_checkpointing": True}),
    ],
)
def test_each_way_to_ask_becomes_one_setting(words, keys, expected):
    config = parsed(*words, **keys)
    assert {name: getattr(config, name) for name in expected} == expected
    others = set(vars(config)) - set(expected)
    assert {name: getattr(config, name) for name in others} == {name: getattr(FsdpConfig(), name) for name in others}


@pytest.mark.parametrize(
    ("words", "keys", "message"),
    [
        ([], {"transformer_layer_cls": "A"}, r"no setting 'transformer_layer_cls'.*'transformer_layer_cls_to_wrap'\?"),
        (["no_shard"], {}, r"'no_shard' shards nothing: leave out fsdp"),
        ([], {"sharding_strategy": 3}, r"'no_shard' shards nothing"),
        ([], {"sharding_strategy": "FULL"}, r"sharding_strategy='FULL' must be one of"),
        ([], {"sharding_strategy": 6}, r"sharding_strategy=6 must be one of"),
        ([], {"xla": True}, r"xla=True is about torch_xla"),
        ([], {"ignored_modules": "lm_head"}, r"ignored_modules='lm_head' would leave.*requires_grad=False"),
        ([], {"mixed_precision_policy": {"param_dtype": "bf16"}}, r"mixed_precision_policy.*bf16=True"),
        ([], {"state_dict_type": "LOCAL_STATE_DICT"}, r"must be one of.*same number of processes"),
        ([], {"state_dict_type": "full"}, r"state_dict_type='full' must be one of"),
        ([], {"auto_wrap_policy": "blocks"}, r"auto_wrap_policy='blocks' must be one of"),
        ([], {"auto_wrap_policy": "SIZE_BASED_WRAP"}, r"needs min_num_params above 0"),
        ([], {"min_num_params": -1}, r"min_num_params=-1 must be"),
        ([], {"version": 3}, r"version=3 is not known"),
        ([], {"cpu_ram_efficient_loading": True, "sync_module_states": False}, r"needs sync_module_states=True"),
        ([], {"offload_params": True, "cpu_offload": False}, r"sets offload_params twice, to True and False"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words, keys, message):
    with pytest.raises(ValueError, match=message):
        parsed(*words, **keys)


def test_a_switch_that_is_a_text_is_refused():
    with pytest.raises(TypeError, match=r"forward_prefetch='later' must be True or False"):
        parsed(forward_prefetch="later")


def test_a_setting_without_effect_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        parsed(backward_prefetch="no_prefetch", use_orig_params=False, limit_all_gathers=False)
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 2 and all("has no effect" in text for text in named)


def test_the_environment_of_accelerate_launch_is_read():
    launched = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "True",
        "FSDP_ACTIVATION_CHECKPOINTING": "",
    }
    assert FsdpConfig.from_environment(launched) == FsdpConfig(
        reshard_after_forward=False,
        auto_wrap_policy="transformer_based_wrap",
        transformer_layer_cls_to_wrap=["LlamaDecoderLayer"],
        offload_params=True,
        state_dict_type="sharded_state_dict",
        cpu_ram_efficient_loading=True,
    )


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "2"}])
def test_an_environment_that_does_not_ask_gives_nothing(environment):
    assert FsdpConfig.from_environment(environment) is None


def test_every_setting_says_what_it_does():
    import dataclasses

    assert all(len(one.metadata["help"]) > 20 for one in dataclasses.fields(FsdpConfig))
