"""Arguments written as plain data and read again are the same, but for tokens, which no written form holds."""

import copy
import dataclasses
import functools
import json
import pickle
import warnings
from typing import Any

import pytest
import yaml

from trainwright import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from trainwright.args.accelerator_config import AcceleratorConfig

FIELDS = {field.name: field for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
TOKENS = {name for name in FIELDS if name.endswith("_token")}

# A value other than the default where none can be derived from the type; what it needs beside it.
VALUES: dict[str, Any] = {
    "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}, "optim": "adamw_hf",
    "learning_rate_per_module": {"head": 1e-3}, "train_sampling_strategy": "sequential",
    "packing_long_samples": "error",
    "label_names": ["a", "b"], "dataloader_multiprocessing_context": "spawn", "logging_strategy": "epoch",
    "eval_strategy": "epoch", "save_strategy": "no", "save_frozen_weights": "always", "eval_loss_average": "batches",
    "eval_sampling_strategy": "group_by_length", "include_for_metrics": ["inputs", "loss"],
    "half_precision_backend": "cpu_amp", "fp16_backend": "amp",
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": True}, "torch_compile_backend": "eager",
    "torch_compile_mode": "default", "use_regional_compilation": ["Block"], "torchdynamo": "eager",
    "liger_kernel_config": {"rope": True}, "ddp_backend": "gloo", "fsdp": ["full_shard"],
    "fsdp_config": {"min_num_params": 3}, "deepspeed": {"zero_optimization": {"stage": 2}},
    "accelerator_config": AcceleratorConfig(split_batches=True), "report_to": "none",
    "trackio_static_space_id": "space", "log_level": "info", "log_level_replica": "error",
    "include_num_input_tokens_seen": "non_padding", "time_breakdown": "logs", "profile_steps": {"first": 2, "last": 3},
    "debug": "underflow_overflow", "hub_strategy": "checkpoint", "auto_find_batch_size_mode": "restart",
    "nonfinite": "skip", "generation_config": "gpt2", "adam_beta1": 0.5, "adam_beta2": 0.5, "ema_decay": 0.9,
    "label_smoothing_factor": 0.1, "warmup_ratio": 0.1, "optim_args": "a=1", "local_rank": 0, "max_steps": 5,
    "logging_steps": 0.1, "save_steps": 7, "fp16_opt_level": "O2",
}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {
    "packing": {"packing_length": 8}, "packing_length": {"packing": True},
    "packing_long_samples": {"packing": True, "packing_length": 8},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 2},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "load_best_model_at_end": {"eval_strategy": "steps"},
    "eval_on_start": {"eval_strategy": "steps"}, "fp16": {"use_cpu": False}, "use_mps_device": {"use_cpu": False},
    "push_to_hub_organization": {"push_to_hub_model_id": "name"}, "liger_kernel_config": {"use_liger_kernel": True},
    "fsdp_config": {"fsdp": "full_shard"}, "fsdp_min_num_params": {"fsdp": "full_shard"},
    "fsdp_transformer_layer_cls_to_wrap": {"fsdp": "full_shard"}, "ema_start_step": {"ema_decay": 0.9},
    "ema_update_steps": {"ema_decay": 0.9}, "ema_eval": {"ema_decay": 0.9}, "peak_tflops_per_s": {"log_speed": True},
    "optimizer_in_backward": {"max_grad_norm": 0},
}  # fmt: skip
REFUSED = {"use_ipex", "mp_parameters", "parallelism_config"}  # retired, not installed, an engine not in this release


def other_value(name):
    if name in VALUES:
        return VALUES[name]
    default, declared = FIELDS[name].default, str(FIELDS[name].type)
    if isinstance(default, bool) or declared.startswith("bool"):
        return not default
    if declared.startswith(("int", "float")):
        return (default or 0) + (3 if declared.startswith("int") else 0.5)
    assert declared.startswith(("str", "list")), f"{name}: {declared} needs a row in VALUES"
    return "other"


def built(cls=Seq2SeqTrainingArguments, **values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of older names
        return cls(**{"output_dir": "out", "use_cpu": True, **values})


parser_of = functools.cache(HfArgumentParser)


def ways_through_plain_data(args):
    """Name of the way -> the arguments it gives back."""
    cls, plain, text = type(args), args.to_dict(), args.to_json_string()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return {
            "to_dict": cls(**plain),
            "reversed": cls(**dict(reversed(plain.items()))),
            "JSON, sorted": cls(**json.loads(json.dumps(json.loads(text), sort_keys=True))),
            "parse_dict": parser_of(cls).parse_dict(plain)[0],
        }


def ways_through_files(args, directory):
    (directory / "args.json").write_text(args.to_json_string())
    (directory / "args.yaml").write_text(yaml.safe_dump(args.to_dict()))  # sorted by name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return {
            "YAML": type(args)(**yaml.safe_load((directory / "args.yaml").read_text())),
            "parse_json_file": parser_of(type(args)).parse_json_file(str(directory / "args.json"))[0],
            "parse_yaml_file": parser_of(type(args)).parse_yaml_file(str(directory / "args.yaml"))[0],
        }


def ways_that_copy(args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return {
            "replace": dataclasses.replace(args),
            "copy": copy.copy(args),
            "deepcopy": copy.deepcopy(args),
            "pickle": pickle.loads(pickle.dumps(args)),
        }


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - REFUSED - TOKENS - {"output_dir"}))
def test_a_field_keeps_its_value_through_plain_data_and_copies(name):
    args = built(**{**BESIDE.get(name, {}), name: other_value(name)})
    assert getattr(args, name) != FIELDS[name].default
    for way, again in {**ways_through_plain_data(args), **ways_that_copy(args)}.items():
        different = [field for field in FIELDS.keys() - TOKENS if getattr(again, field) != getattr(args, field)]
        assert not different, way


@pytest.mark.parametrize("given", [{}, {"hub_token": "secret"}, {"push_to_hub_token": "secret"}])
@pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments])
def test_what_is_written_in_place_of_a_token_is_nobodys_token(cls, given, tmp_path):
    args = built(cls, **given)
    assert "secret" not in args.to_json_string()
    for way, again in {**ways_through_plain_data(args), **ways_through_files(args, tmp_path)}.items():
        assert again.use_cpu and again.learning_rate == args.learning_rate, way
        assert (again.hub_token, again.push_to_hub_token) == (None, None), way
    for way, again in ways_that_copy(args).items():
        assert (again.hub_token, again.push_to_hub_token) == (args.hub_token, args.push_to_hub_token), way


def test_a_token_goes_beside_the_written_form():
    args = built(hub_token="secret", learning_rate=1e-3)
    again = Seq2SeqTrainingArguments(**{**args.to_dict(), "hub_token": args.hub_token})
    assert again == args and again.hub_token == "secret"


@dataclasses.dataclass
class WithFieldsOfItsOwn(TrainingArguments):
    learning_rate: float = 2e-5
    eos_token: str | None = None
    model_init_kwargs: dict[str, Any] | None = None


def test_arguments_of_the_base_become_those_of_a_subclass_that_has_its_own_tokens():
    args = built(TrainingArguments, learning_rate=1e-3)
    derived = WithFieldsOfItsOwn(**args.to_dict())  # how a library takes over plain TrainingArguments
    assert (derived.learning_rate, derived.eos_token) == (1e-3, None)
    derived.eos_token, derived.model_init_kwargs = "</s>", {"a": [1]}
    again = WithFieldsOfItsOwn(**derived.to_dict())
    assert (again.eos_token, again.model_init_kwargs) == (None, {"a": [1]})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"no_cuda": False}, {"use_cpu": False, "no_cuda": False}),
        ({"use_cpu": False}, {"use_cpu": False, "no_cuda": False}),
        ({"activation_checkpointing": False}, {"gradient_checkpointing": False}),
        ({"seed": 3}, {"use_cpu": True, "gradient_checkpointing": True, "seed": 3}),
    ],
)
def test_of_two_names_of_one_setting_replace_follows_the_one_that_it_changes(change, expected):
    args = built(TrainingArguments, no_cuda=True, gradient_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        changed = dataclasses.replace(args, **change)
    assert {name: getattr(changed, name) for name in expected} == expected
