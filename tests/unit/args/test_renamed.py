"""Older names: each is accepted, takes effect, and is reported once at the caller's line."""

import dataclasses
import runpy
import types
import warnings

import pytest

from trainwright.args import renamed
from trainwright.args.accelerator_config import AcceleratorConfig
from trainwright.args.renamed import RENAMED, RENAMED_VALUES, twin_value
from trainwright.args.training import TrainingArguments
from trainwright.names import DebugOption, FSDPOption

ROWS = [  # (older argument, what it must bring about)
    ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch", "do_eval": True}),
    ({"xpu_backend": "gloo"}, {"ddp_backend": "gloo"}),
    ({"sharded_ddp": "zero_dp_3 offload"}, {"fsdp": [FSDPOption.FULL_SHARD, FSDPOption.OFFLOAD]}),
    ({"sharded_ddp": "simple"}, {"fsdp": [FSDPOption.SHARD_GRAD_OP]}),
    ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3, "per_gpu_train_batch_size": 3}),
    ({"per_gpu_eval_batch_size": 3}, {"per_device_eval_batch_size": 3, "per_gpu_eval_batch_size": 3}),
    ({"no_cuda": True}, {"use_cpu": True, "no_cuda": True}),
    ({"adafactor": True}, {"optim": "adafactor", "adafactor": True}),
    ({"fp16_backend": "cpu_amp"}, {"half_precision_backend": "cpu_amp"}),
    ({"fp16_backend": "amp"}, {"half_precision_backend": "auto"}),
    ({"torchdynamo": "eager"}, {"torch_compile": True, "torch_compile_backend": "eager"}),
    ({"push_to_hub_token": "t"}, {"hub_token": "t"}),
    ({"push_to_hub_model_id": "m"}, {"hub_model_id": "m"}),
    ({"push_to_hub_organization": "o"}, {"hub_model_id": "o/out"}),
    ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
    ({"tpu_metrics_debug": True}, {"debug": [DebugOption.TPU_METRICS_DEBUG]}),
    ({"use_mps_device": True}, {"use_mps_device": True}),
    ({"fsdp_min_num_params": 7}, {"fsdp_min_num_params": 7}),
    ({"fsdp_transformer_layer_cls_to_wrap": "A,B"}, {}),
    ({"dispatch_batches": True}, {}),
    ({"split_batches": True}, {}),
    ({"optim": "adamw_hf"}, {"optim": "adamw_torch"}),
    ({"half_precision_backend": "cuda_amp"}, {"half_precision_backend": "auto"}),
]


def new(**kwargs):
    return TrainingArguments("out", logging_dir="logs", report_to="none", **kwargs)


@pytest.mark.parametrize(("older", "newer"), ROWS)
def test_an_older_name_takes_effect_and_warns_once_at_the_callers_line(older, newer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = TrainingArguments("out", report_to="none", **older)
    assert {name: getattr(args, name) for name in newer} == newer
    assert [(w.category, w.filename) for w in caught] == [(FutureWarning, __file__)]
    assert next(iter(older)) in str(caught[0].message)


def test_every_row_has_a_test_here():
    tested = {name for older, _ in ROWS for name in older}
    assert tested >= (set(RENAMED) - {"use_ipex"}) | {name for name, _ in RENAMED_VALUES}


def test_the_warning_points_past_a_subclass_and_replace():
    @dataclasses.dataclass
    class Config(TrainingArguments):
        extra: int = 1

    with pytest.warns(FutureWarning) as caught:
        dataclasses.replace(Config("out", report_to="none"), no_cuda=True)
    assert {w.filename for w in caught} == {__file__}


def test_ipex_is_retired_and_what_replaces_it_is_named():
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match=r"use_ipex=True is retired.*torch_compile=True"):
        new(use_ipex=True)


def test_organization_and_model_join_and_warn_once_each():
    with pytest.warns(FutureWarning) as caught:
        args = new(push_to_hub_model_id="m", push_to_hub_organization="o")
    assert args.hub_model_id == "o/m" and len(caught) <= 2


@pytest.mark.parametrize("output_dir", ["a/b", "a/b/", "/a/b"])
def test_an_organization_goes_before_the_last_part_of_output_dir(output_dir):
    with pytest.warns(FutureWarning):
        args = TrainingArguments(output_dir, report_to="none", push_to_hub_organization="o")
    assert args.hub_model_id == "o/b"


def test_older_accelerate_options_join_the_given_config():
    with pytest.warns(FutureWarning):
        args = new(dispatch_batches=False, split_batches="true", accelerator_config={"even_batches": False})
    config = args.accelerator_config
    assert (config.dispatch_batches, config.split_batches, config.even_batches) == (False, True, False)


def test_older_fsdp_options_reach_the_config_and_must_not_contradict_it():
    with pytest.warns(FutureWarning):
        args = new(fsdp="full_shard auto_wrap", fsdp_transformer_layer_cls_to_wrap="A, B")
    assert args.fsdp_config["transformer_layer_cls_to_wrap"] == ["A", "B"]
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="drop fsdp_min_num_params"):
        new(fsdp_min_num_params=5, fsdp_config={"min_num_params": 6})


def test_older_and_newer_name_may_not_contradict_each_other():
    with pytest.raises(ValueError, match="per_gpu_train_batch_size=4 and per_device_train_batch_size=16"):
        new(per_gpu_train_batch_size=4, per_device_train_batch_size=16)
    with pytest.raises(ValueError, match="evaluation_strategy"):
        new(evaluation_strategy="epoch", eval_strategy="steps")


def test_older_and_newer_name_that_agree_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert new(no_cuda=True, use_cpu=True).use_cpu
        assert new(no_cuda=False, per_gpu_train_batch_size=None).use_cpu is False


def test_inputs_are_added_to_what_metrics_already_get():
    with pytest.warns(FutureWarning):
        assert new(include_inputs_for_metrics=True, include_for_metrics=["loss"]).include_for_metrics == [
            "loss",
            "inputs",
        ]


SWITCHED_OFF = [  # (older switch, what may be given beside it)
    ({"adafactor": False}, {"optim": "sgd"}),
    ({"adafactor": False}, {"optim": "adafactor"}),
    ({"group_by_length": False}, {"train_sampling_strategy": "sequential"}),
    ({"group_by_length": False}, {"train_sampling_strategy": "batch_rebalance"}),
    ({"no_cuda": False}, {"use_cpu": True}),
    ({"include_inputs_for_metrics": False}, {"include_for_metrics": ["inputs"]}),
    ({"include_inputs_for_metrics": False}, {"include_for_metrics": ["loss"]}),
    ({"tpu_metrics_debug": False}, {"debug": [DebugOption.TPU_METRICS_DEBUG]}),
    ({"use_mps_device": False}, {}),
    ({"use_ipex": False}, {}),
    ({"gradient_checkpointing": False}, {}),
    ({"fsdp_min_num_params": 0}, {}),
]


@pytest.mark.parametrize(("older", "newer"), SWITCHED_OFF)
def test_an_older_switch_that_is_off_changes_nothing_and_is_no_reason_to_warn(older, newer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert new(**older) == new()
        for given in ({**older, **newer}, {**newer, **older}):
            args = new(**given)
            assert args == new(**newer)
            assert {name: getattr(args, name) for name in newer} == newer


def test_an_older_switch_that_is_off_changes_nothing_in_a_copy_or_later_either():
    args = new(train_sampling_strategy="sequential", optim="sgd")
    copied = dataclasses.replace(args, group_by_length=False, adafactor=False)
    assert (copied.train_sampling_strategy, copied.optim) == ("sequential", "sgd")
    args.group_by_length = args.adafactor = False
    assert (args.train_sampling_strategy, args.optim) == ("sequential", "sgd")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("older", [older for older, _ in ROWS])
def test_a_copy_by_replace_is_equal_whatever_older_name_was_used(older):
    args = new(**older)
    assert dataclasses.replace(args) == args


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_replace_changes_the_newer_name_although_the_older_was_used():
    assert (
        dataclasses.replace(new(per_gpu_train_batch_size=4), per_device_train_batch_size=8).per_device_train_batch_size
        == 8
    )
    assert dataclasses.replace(new(no_cuda=True), use_cpu=False).use_cpu is False
    assert dataclasses.replace(new(group_by_length=True), group_by_length=False).train_sampling_strategy == "random"
    assert dataclasses.replace(new(group_by_length=True), train_sampling_strategy="random").group_by_length is False
    assert (
        dataclasses.replace(new(gradient_checkpointing=True), activation_checkpointing=False).gradient_checkpointing
        is False
    )
    assert dataclasses.replace(new(adafactor=True), optim="sgd").optim == "sgd"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_replace_changes_the_older_name_as_well():
    assert dataclasses.replace(new(no_cuda=True), no_cuda=False).use_cpu is False
    assert dataclasses.replace(new(), no_cuda=True).use_cpu is True
    assert (
        dataclasses.replace(new(per_gpu_train_batch_size=4), per_gpu_train_batch_size=6).per_device_train_batch_size
        == 6
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_passing_every_field_in_order_lets_the_older_name_that_is_set_take_effect():
    values = {f.name: getattr(new(), f.name) for f in dataclasses.fields(TrainingArguments) if f.init}
    assert TrainingArguments(**{**values, "no_cuda": True}).use_cpu is True
    assert TrainingArguments(**{**values, "train_sampling_strategy": "group_by_length"}).group_by_length is True


def test_a_field_that_a_subclass_brings_is_not_translated():
    @dataclasses.dataclass
    class Config(TrainingArguments):
        split_batches: str = "by hand"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = Config("out", report_to="none", split_batches="mine")
    assert args.split_batches == "mine" and args.accelerator_config.split_batches is False


def test_contradicting_twins_are_refused():
    with pytest.raises(ValueError, match="contradict"):
        new(group_by_length=True, train_sampling_strategy="sequential")


def test_older_names_are_accepted_by_position():
    args = TrainingArguments("out", True)
    assert args.overwrite_output_dir is True


def test_tokens_are_not_shown_in_messages():
    with pytest.warns(FutureWarning) as caught:
        new(push_to_hub_token="hf_secret")
    with pytest.raises(ValueError, match="hub_token=<hidden>") as error:
        new(push_to_hub_token="hf_secret", hub_token="hf_other")
    assert "hf_" not in str(caught[0].message) + str(error.value)


CONFIG = AcceleratorConfig().to_dict()
TRANSLATIONS = [  # (older name, value, what else was passed, newer arguments)
    ("evaluation_strategy", "epoch", {}, {"eval_strategy": "epoch"}),
    ("xpu_backend", "gloo", {}, {"ddp_backend": "gloo"}),
    ("sharded_ddp", "simple offload", {}, {"fsdp": "shard_grad_op offload"}),
    ("sharded_ddp", "zero_dp_2", {}, {"fsdp": "shard_grad_op"}),
    ("sharded_ddp", [types.SimpleNamespace(value="zero_dp_3"), "offload"], {}, {"fsdp": "full_shard offload"}),
    ("sharded_ddp", "", {}, {}),
    ("sharded_ddp", None, {}, {}),
    ("dispatch_batches", "true", {}, {"accelerator_config": CONFIG | {"dispatch_batches": True}}),
    (
        "split_batches",
        True,
        {"accelerator_config": {"even_batches": False}},
        {"accelerator_config": CONFIG | {"even_batches": False, "split_batches": True}},
    ),
    ("per_gpu_train_batch_size", 3, {}, {"per_device_train_batch_size": 3}),
    ("per_gpu_eval_batch_size", 3, {}, {"per_device_eval_batch_size": 3}),
    ("no_cuda", True, {}, {"use_cpu": True}),
    ("adafactor", True, {}, {"optim": "adafactor"}),
    ("adafactor", False, {}, {}),
    ("fp16_backend", "amp", {}, {"half_precision_backend": "auto"}),
    ("fp16_backend", "cuda_amp", {}, {"half_precision_backend": "auto"}),
    ("fp16_backend", "cpu_amp", {}, {"half_precision_backend": "cpu_amp"}),
    ("torchdynamo", "eager", {}, {"torch_compile_backend": "eager"}),
    ("push_to_hub_token", "t", {}, {"hub_token": "t"}),
    ("push_to_hub_model_id", "m", {"push_to_hub_model_id": "m", "output_dir": "a/b"}, {"hub_model_id": "m"}),
    ("push_to_hub_organization", "o", {"push_to_hub_organization": "o"}, {"hub_model_id": "o/trainer_output"}),
    ("push_to_hub_organization", "o", {"push_to_hub_organization": "o", "output_dir": "a/b"}, {"hub_model_id": "o/b"}),
    (
        "push_to_hub_organization",
        "o",
        {"push_to_hub_organization": "o", "push_to_hub_model_id": "m", "output_dir": "a/b"},
        {"hub_model_id": "o/m"},
    ),
    ("include_inputs_for_metrics", True, {}, {"include_for_metrics": ["inputs"]}),
    (
        "include_inputs_for_metrics",
        True,
        {"include_for_metrics": ["loss"]},
        {"include_for_metrics": ["loss", "inputs"]},
    ),
    ("include_inputs_for_metrics", True, {"include_for_metrics": ["inputs"]}, {"include_for_metrics": ["inputs"]}),
    ("include_inputs_for_metrics", False, {"include_for_metrics": ("loss",)}, {"include_for_metrics": ["loss"]}),
    ("use_ipex", True, {}, {}),
]


@pytest.mark.parametrize(("older", "value", "given", "newer"), TRANSLATIONS)
def test_each_row_says_what_an_older_name_is_today(older, value, given, newer):
    before = dict(given)
    # The table is made when the module is imported: made here once more.
    name = renamed.__name__
    for table in (RENAMED, runpy.run_path(renamed.__file__, run_name=name)["RENAMED"]):
        assert table[older].old == older
        assert table[older].translate(value, given) == newer
    assert given == before


@pytest.mark.parametrize(
    ("name", "value", "current", "expected"),
    [
        ("group_by_length", True, "random", "group_by_length"),
        ("group_by_length", "true", "random", "group_by_length"),
        ("group_by_length", "False", "group_by_length", "random"),
        ("group_by_length", False, "group_by_length", "random"),
        ("group_by_length", False, "sequential", "sequential"),
        ("train_sampling_strategy", "group_by_length", None, True),
        ("train_sampling_strategy", "random", None, False),
        ("gradient_checkpointing", True, False, True),
        ("activation_checkpointing_kwargs", {"a": 1}, None, {"a": 1}),
    ],
)
def test_a_twin_follows_its_twin(name, value, current, expected):
    assert twin_value(name, value, current) == expected
