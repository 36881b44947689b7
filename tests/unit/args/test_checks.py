"""Values: one form for each, and an error that names argument, value and cure for what is not allowed."""

import dataclasses
import json

import pytest

from trainwright.args.checks import typed
from trainwright.args.seq2seq import Seq2SeqTrainingArguments
from trainwright.args.training import TrainingArguments
from trainwright.names import DebugOption, FSDPOption, SaveStrategy


def new(**kwargs):
    return TrainingArguments("out", report_to="none", **kwargs)


@pytest.mark.parametrize(
    "name",
    ["async_save", "ema_eval", "log_speed", "optimizer_in_backward", "packing", "save_on_exception", "save_on_signal"],
)
def test_a_switch_is_true_or_false_and_no_text_that_would_count_as_true(name):
    with pytest.raises(TypeError, match=f"{name}='false' must be True or False. Did you mean False, without quotes"):
        new(**{name: "false"})
    with pytest.raises(TypeError, match=rf"{name}=2 must be True or False\.$"):
        new(**{name: 2})


@pytest.mark.parametrize("name", ["bf16", "gradient_checkpointing", "save_safetensors", "predict_with_generate"])
def test_text_is_no_switch_of_the_documented_arguments_either(name):
    with pytest.raises(TypeError, match=f"{name}='False' must be True or False. Did you mean False, without quotes"):
        Seq2SeqTrainingArguments("out", report_to="none", **{name: "False"})


def test_text_in_a_switch_that_a_subclass_brings_is_its_own_affair():
    @dataclasses.dataclass
    class Config(TrainingArguments):
        sharding: "bool" = False
        bf16: "bool" = False

    assert Config("out", report_to="none", sharding="auto", bf16="auto").sharding == "auto"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_train_epochs": "three", "max_steps": 5}, "num_train_epochs='three' is not a number"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"learning_rate": "fast"}, "learning_rate='fast' is not a number; a finite number at least 0 is needed"),
        ({"ema_start_step": 5}, "ema_start_step=5 is about the average of the weights, but ema_decay=None"),
        ({"ema_update_steps": 2}, "leave ema_update_steps out"),
        ({"ema_eval": False}, "leave ema_eval out"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"per_device_eval_batch_size": 2.5}, "whole number"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"label_smoothing_factor": 1.0}, "less than 1"),
        ({"warmup_ratio": 1.5}, "warmup_steps"),
        ({"warmup_steps": 2.5}, "whole"),
        ({"max_grad_norm": -1}, "max_grad_norm"),
        ({"num_train_epochs": 0}, "max_steps"),
        ({"max_steps": -2}, "num_train_epochs"),
        ({"save_total_limit": 0}, "None keeps all"),
        ({"logging_steps": 0}, "logging_strategy='steps'"),
        ({"logging_steps": 10.5}, "whole number"),
        ({"save_steps": -1}, "save_steps=-1"),
        ({"eval_delay": -1}, "eval_delay"),
        ({"neftune_noise_alpha": 0}, "None switches the noise off"),
        ({"past_index": -2}, "past_index"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "32 bits"),
        ({"adam_beta1": 1}, "adam_beta1"),
        ({"ddp_timeout": 0}, "seconds"),
        ({"output_dir": ""}, "trainer_output"),
        ({"optim": "adamw_torc"}, "Did you mean 'adamw_torch'"),
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'"),
        ({"eval_strategy": "step"}, "Did you mean 'steps'"),
        ({"hub_strategy": "always"}, "hub_strategy"),
        ({"debug": "overflow"}, "debug"),
        ({"fsdp": "full"}, "fsdp"),
        ({"fsdp": "offload"}, "full_shard offload"),
        ({"fsdp": "full_shard shard_grad_op"}, "exclude"),
        (
            {
                "fsdp": "full_shard",
                "deepspeed": {},
                "fsdp_config": {"min_num_params": 1, "transformer_layer_cls_to_wrap": "A"},
            },
            "keep one",
        ),
        ({"fsdp": "full_shard", "deepspeed": {"a": 1}}, "keep one"),
        ({"deepspeed": "missing.json"}, "missing.json"),
        ({"fsdp_config": "missing.json"}, "missing.json"),
        ({"bf16": True, "fp16": True}, "bf16=True and fp16=True"),
        ({"bf16_full_eval": True, "fp16_full_eval": True}, "exclude"),
        ({"half_precision_backend": "apx"}, "Did you mean 'apex'"),
        ({"fp16_opt_level": "O4"}, "fp16_opt_level"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ({"dataloader_persistent_workers": True}, "dataloader_num_workers"),
        ({"dataloader_multiprocessing_context": "fork"}, "dataloader_num_workers"),
        ({"train_sampling_strategy": "rando"}, "Did you mean 'random'"),
        ({"eval_loss_average": "tokens"}, "items"),
        ({"include_for_metrics": ["labels"]}, "labels"),
        ({"include_num_input_tokens_seen": "some"}, "non_padding"),
        ({"log_level": "inf"}, "Did you mean 'info'"),
        ({"accelerator_config": {"split_batch": True}}, "Did you mean 'split_batches'"),
        ({"accelerator_config": "{not json}"}, "accelerator_config"),
        ({"lr_scheduler_kwargs": "num_cycles=2"}, "JSON"),
        ({"lr_scheduler_kwargs": "[1]"}, "JSON"),
        ({"use_cpu": True, "use_mps_device": True}, "exclude"),
        ({"ddp_backend": "ncl"}, "Did you mean 'nccl'"),
        ({"save_strategy": "best"}, "eval_strategy"),
        ({"async_save": True, "save_strategy": "no"}, "save_strategy='no' makes none"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "eval_strategy"),
        ({"load_best_model_at_end": True}, "eval_strategy"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "save_strategy='steps'"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 300}, "multiple"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1}, "both the same way"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.2, "save_steps": 0.5}, "multiple"),
        ({"generation_num_beams": 0}, "generation_num_beams"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_wrong_value_is_an_error_that_names_it(given, words):
    with pytest.raises(ValueError) as caught:
        Seq2SeqTrainingArguments(**{"output_dir": "out", "report_to": "none", **given})
    assert words in str(caught.value)


@pytest.mark.parametrize(("value", "kind"), [(True, "bool"), ([1], "list")])
def test_a_value_that_is_no_number_is_refused_by_type(value, kind):
    with pytest.raises(TypeError, match=f"learning_rate.*{kind}"):
        new(learning_rate=value)


def test_one_label_name_as_text_is_refused():
    with pytest.raises(TypeError, match=r"\['labels'\]"):
        new(label_names="labels")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"learning_rate": "1e-4"}, {"learning_rate": 1e-4}),
        ({"logging_steps": 10.0}, {"logging_steps": 10}),
        ({"warmup_steps": 100.0}, {"warmup_steps": 100}),
        ({"warmup_steps": 0.25}, {"warmup_steps": 0.25}),
        ({"max_grad_norm": None}, {"max_grad_norm": None}),
        ({"max_grad_norm": float("inf")}, {"max_grad_norm": float("inf")}),
        ({"max_steps": 10, "num_train_epochs": 0}, {"max_steps": 10}),
        ({"eval_strategy": "steps"}, {"do_eval": True, "eval_steps": 500}),
        ({"eval_strategy": "steps", "logging_steps": 0.1}, {"eval_steps": 0.1}),
        ({"eval_strategy": False}, {"eval_strategy": "no", "do_eval": False}),
        ({"logging_strategy": "no", "logging_steps": 0}, {"logging_steps": 0}),
        (
            {"save_strategy": "best", "eval_strategy": "epoch"},
            {"metric_for_best_model": "loss", "greater_is_better": False},
        ),
        ({"metric_for_best_model": "accuracy"}, {"greater_is_better": True}),
        ({"metric_for_best_model": "eval_loss"}, {"greater_is_better": False}),
        ({"metric_for_best_model": "eval_val_loss"}, {"greater_is_better": False}),
        ({"metric_for_best_model": "val_loss"}, {"greater_is_better": False}),
        ({"metric_for_best_model": "eval_loss_ratio"}, {"greater_is_better": True}),
        ({"metric_for_best_model": "loss", "greater_is_better": True}, {"greater_is_better": True}),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            {"metric_for_best_model": "loss"},
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.3},
            {"save_steps": 0.3},
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "best"},
            {"save_strategy": SaveStrategy.BEST},
        ),
        (
            {"lr_scheduler_kwargs": '{"min_lr": "1e-5", "deep": {"on": "true"}}'},
            {"lr_scheduler_kwargs": {"min_lr": 1e-5, "deep": {"on": True}}},
        ),
        ({"lr_scheduler_kwargs": None}, {"lr_scheduler_kwargs": {}}),
        ({"torch_compile_mode": "max-autotune"}, {"torch_compile": True, "torch_compile_backend": "inductor"}),
        ({"fsdp": True}, {"fsdp": [FSDPOption.FULL_SHARD]}),
        ({"fsdp": None}, {"fsdp": []}),
        ({"fsdp": "full_shard auto_wrap"}, {"fsdp": [FSDPOption.FULL_SHARD, FSDPOption.AUTO_WRAP]}),
        ({"debug": "underflow_overflow"}, {"debug": [DebugOption.UNDERFLOW_OVERFLOW]}),
        ({"include_num_input_tokens_seen": True}, {"include_num_input_tokens_seen": "all"}),
        ({"include_num_input_tokens_seen": "no"}, {"include_num_input_tokens_seen": False}),
        ({"include_for_metrics": "loss"}, {"include_for_metrics": ["loss"]}),
        ({"train_sampling_strategy": "group_by_length"}, {"group_by_length": True}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        (
            {"group_by_length": False, "train_sampling_strategy": "sequential"},
            {"train_sampling_strategy": "sequential"},
        ),
        ({"activation_checkpointing": True}, {"gradient_checkpointing": True}),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {"activation_checkpointing_kwargs": {"use_reentrant": False}},
        ),
    ],
)
def test_a_value_takes_its_one_form(given, expected):
    args = new(**given)
    assert {name: getattr(args, name) for name in expected} == expected


def test_fsdp_settings_lose_their_prefix_and_gain_defaults():
    args = new(fsdp="full_shard", fsdp_config={"fsdp_transformer_layer_cls_to_wrap": "Block, Head", "xla": True})
    assert args.fsdp_config == {
        "min_num_params": 0,
        "xla": True,
        "xla_fsdp_v2": False,
        "xla_fsdp_grad_ckpt": False,
        "transformer_layer_cls_to_wrap": ["Block", "Head"],
    }


def test_settings_are_read_from_json_files(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"min_num_params": 5}))
    assert new(fsdp_config=str(file)).fsdp_config["min_num_params"] == 5
    assert new(deepspeed=str(file)).deepspeed == str(file)  # DeepSpeed reads it itself
    file.write_text(json.dumps({"even_batches": False}))
    assert new(accelerator_config=file).accelerator_config.even_batches is False


@pytest.mark.parametrize(("given", "package"), [({"mp_parameters": "a=1"}, "smdistributed")])
def test_an_option_that_needs_a_missing_package_names_it(given, package):
    with pytest.raises(ImportError, match=f"pip install {package}"):
        new(**given)


def test_text_inside_a_json_dict_is_typed():
    assert typed({"a": "1", "b": ["2.5", "x"], "c": "None", "d": 3}) == {"a": 1, "b": [2.5, "x"], "c": None, "d": 3}
