"""DeepSpeed's configuration: where it is found, what fills its "auto" values, and which contradictions are named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainwright import TrainingArguments
from trainwright.optim.build import build_optimizer
from trainwright.optim.registry import ROWS, optimizer_class_and_kwargs
from trainwright.parallel import deepspeed_config as ds

PAGE = Path(__file__).parents[3] / "docs" / "distributed.md"
EVERY_AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
}


def arguments(config: Any = None, **given: Any) -> TrainingArguments:
    return TrainingArguments("out", report_to="none", use_cpu=True, deepspeed=config, **given)


def request(config: Any = None, **given: Any) -> tuple[ds.Requested, TrainingArguments]:
    args = arguments(config, **given)
    return ds.requested(args, {}), args


def stage(number: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number}, **more}


# -- where it comes from -----------------------------------------------------------------------------------------------


def test_a_dict_and_the_file_that_holds_it_are_the_same_request(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(stage(2)), encoding="utf-8")
    assert request(stage(2))[0].config == request(str(file))[0].config == stage(2)
    assert request(str(file))[0].where == str(file)


def test_the_dict_of_the_arguments_is_not_changed_by_filling_it() -> None:
    given = {"zero_optimization": {"stage": 1}}
    found, args = request(given)
    ds.filled(found, args, num_processes=2)
    assert given == {"zero_optimization": {"stage": 1}}


def test_the_variables_of_accelerate_launch_make_a_configuration() -> None:
    environ = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }
    found = ds.requested(arguments(), environ)
    assert found.stage == 3
    assert found.config["gradient_accumulation_steps"] == 4 and found.config["gradient_clipping"] == 0.5
    assert found.config["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "stage3_gather_16bit_weights_on_model_save": True
    }  # fmt: skip


def test_the_file_that_accelerate_launch_names_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(stage(1)), encoding="utf-8")
    environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    assert ds.requested(arguments(), environ) == ds.Requested(stage(1), str(file))


def test_the_argument_wins_over_the_launcher() -> None:
    environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert ds.requested(arguments(stage(1)), environ).stage == 1


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, "nowhere.json"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "much"}, "ACCELERATE_GRADIENT_CLIPPING='much' is not a number"),
    ],
)
def test_a_bad_variable_of_the_launcher_is_named(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ds.requested(arguments(), {"ACCELERATE_USE_DEEPSPEED": "1", **environ})


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_a_file_that_is_no_object_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"ds\.json"):
        ds.requested(arguments(), {"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


# -- its values --------------------------------------------------------------------------------------------------------


def test_every_auto_is_filled_from_the_arguments_the_model_and_the_run() -> None:
    found, args = request(
        EVERY_AUTO, per_device_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.7, bf16=True,
        learning_rate=2e-3, adam_beta1=0.8, adam_beta2=0.98, adam_epsilon=1e-7, weight_decay=0.1, warmup_ratio=0.25,
    )  # fmt: skip
    config = ds.filled(found, args, num_processes=2, hidden_size=10, num_training_steps=40)
    ds.check_filled(config)
    assert config == {
        "train_batch_size": 3 * 5 * 2,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.7,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "optimizer": {
            "type": "AdamW", "params": {"lr": 2e-3, "betas": [0.8, 0.98], "eps": 1e-7, "weight_decay": 0.1}
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 2e-3, "warmup_num_steps": 10, "total_num_steps": 40},
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 10 * 10,
            "stage3_prefetch_bucket_size": 90,
            "stage3_param_persistence_threshold": 10 * 10,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }  # fmt: skip


def test_what_the_configuration_leaves_out_is_as_if_it_were_auto() -> None:
    found, args = request(stage(2), per_device_train_batch_size=4, max_grad_norm=0.5)
    config = ds.filled(found, args, num_processes=2)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (8, 4)
    assert config["gradient_clipping"] == 0.5 and config["bf16"] == {"enabled": False}
    assert "optimizer" not in config and "scheduler" not in config  # the run's are used


def test_no_clipping_is_zero_for_deepspeed() -> None:
    found, args = request(stage(2), max_grad_norm=None)
    assert ds.filled(found, args, num_processes=1)["gradient_clipping"] == 0.0


def test_what_is_not_known_yet_stays_auto() -> None:
    found, args = request(EVERY_AUTO)
    config = ds.filled(found, args, num_processes=1)
    assert config["scheduler"]["params"]["total_num_steps"] == "auto"
    assert config["zero_optimization"]["reduce_bucket_size"] == "auto"


def test_a_model_without_a_hidden_size_gets_deepspeeds_own_buckets() -> None:
    found, args = request(EVERY_AUTO)
    zero = ds.filled(found, args, num_processes=1, hidden_size=0, num_training_steps=4)["zero_optimization"]
    assert zero == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


def test_an_auto_that_nothing_fills_is_named() -> None:
    found, args = request({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}})
    with pytest.raises(ValueError, match=r"zero_optimization\.overlap_comm"):
        ds.check_filled(ds.filled(found, args, num_processes=1, hidden_size=0))


def test_all_contradictions_are_named_in_one_error_with_both_values_and_the_cure() -> None:
    config = stage(
        2, train_micro_batch_size_per_gpu=9, gradient_accumulation_steps=3, train_batch_size=7, gradient_clipping=0.25,
        bf16={"enabled": True}, optimizer={"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.5, 0.6]}},
        scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 99}},
    )  # fmt: skip
    found, args = request(config, per_device_train_batch_size=4, learning_rate=2e-3, optim="sgd")
    with pytest.raises(ValueError) as caught:
        ds.filled(found, args, num_processes=2, num_training_steps=10)
    message = str(caught.value)
    for part in (
        "train_micro_batch_size_per_gpu is 9, and per_device_train_batch_size=4",
        "gradient_accumulation_steps is 3, and gradient_accumulation_steps=1",
        "train_batch_size is 7, and per_device_train_batch_size=4 x gradient_accumulation_steps=1 x 2 processes is 8",
        "gradient_clipping is 0.25, and max_grad_norm=1.0",
        "bf16.enabled is true, and bf16=False",
        "optimizer.params.lr is 0.001, and learning_rate=0.002",
        "optimizer.params.betas is [0.5, 0.6], and adam_beta1=0.9, adam_beta2=0.999",
        "scheduler.params.total_num_steps is 99, and the run makes 10 updates",
        "optimizer.type is \"AdamW\", and optim='sgd'",
        'Write "auto"',
    ):
        assert part in message


def test_a_configuration_that_says_what_the_arguments_say_is_no_contradiction() -> None:
    config = stage(
        1, train_micro_batch_size_per_gpu=4, gradient_clipping=1, optimizer={"type": "Adam", "params": {"lr": 1e-3}}
    )
    found, args = request(config, per_device_train_batch_size=4, learning_rate=0.001)
    assert ds.filled(found, args, num_processes=1)["optimizer"]["params"]["lr"] == 1e-3


def test_a_schedule_of_the_configuration_needs_no_other_in_the_arguments() -> None:
    found, args = request(stage(1, scheduler={"type": "WarmupLR", "params": {}}), lr_scheduler_type="cosine")
    with pytest.raises(ValueError, match="lr_scheduler_type='cosine'"):
        ds.filled(found, args, num_processes=1)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"hidden_size": 8}, 8),
        ({"hidden_sizes": [4, 16, 8]}, 16),
        ({"d_model": 32}, 32),
        ({"text_config": SimpleNamespace(hidden_size=64)}, 64),
        ({}, 0),
    ],
)
def test_the_hidden_size_is_found_under_the_names_that_models_use(config: dict[str, Any], size: int) -> None:
    assert ds.hidden_size_of(SimpleNamespace(config=SimpleNamespace(**config))) == size
    assert ds.hidden_size_of(nn.Linear(3, 3)) == 0


# -- what cannot be combined -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "given", "says"),
    [
        ({}, {}, "leave deepspeed out"),
        (stage(0), {}, "leave deepspeed out"),
        (stage(2, gradient_cliping=1.0), {}, "Did you mean 'gradient_clipping'"),
        (stage(2, tensor_parallel={"autotp_size": 2}), {}, r"tensor_parallel\.autotp_size is 2"),
        (stage(2, gradient_allreduce_op="sum"), {}, "gradient_allreduce_op"),
        (stage(2, optimizer={"type": "Muon"}), {}, "Muon"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, {}, "needs a GPU"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {}, "needs stage 3"),
        (stage(2), {"optim": "adafactor"}, "adamw_torch"),
        (stage(2), {"async_save": True}, "async_save"),
        (stage(1), {"auto_find_batch_size": True}, "auto_find_batch_size"),
        (stage(2), {"optimizer_in_backward": True, "max_grad_norm": 0.0}, "optimizer_in_backward"),
        (stage(2), {"nonfinite": "rollback"}, "nonfinite"),
        (stage(3), {"ema_decay": 0.9}, "ema_decay"),
        (stage(3), {"bf16_full_eval": True}, "bf16_full_eval"),
        (stage(2), {"torch_compile": True}, "torch_compile"),
    ],
)
def test_what_the_engine_does_not_do_is_refused_by_name(config: Any, given: dict[str, Any], says: str) -> None:
    args = arguments(None, **given)
    args.deepspeed = config
    found = ds.Requested(config, "deepspeed")
    with pytest.raises(ValueError, match=says):
        ds.check_supported(found, args, device_type="cpu")


def test_the_table_of_the_page_names_what_is_refused_at_each_stage() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## DeepSpeed")[2].partition("\n## ")[0]
    refused: dict[str, set[str]] = {"stages 1, 2": set(), "stage 3": set()}
    for row in section.splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 3:
            names = {name.partition("=")[0] for name in re.findall(r"`([\w=\"]+)`", cells[0])}
            for stages, verdict in zip(refused, cells[1:]):
                refused[stages] |= names if verdict == "refused" else set()
    of_trainer = {"save_merged_model"}  # which refuses where weights are in parts
    assert refused["stages 1, 2"] == {name for name, (_, stages, _) in ds.REFUSED.items() if 2 in stages}
    assert refused["stage 3"] == {name for name, (_, stages, _) in ds.REFUSED.items() if 3 in stages} | of_trainer


def test_several_refusals_are_one_error() -> None:
    found, args = request(stage(3), ema_decay=0.9, auto_find_batch_size=True, optim="adafactor")
    with pytest.raises(ValueError, match=r"auto_find_batch_size.*ema_decay.*adafactor"):
        ds.check_supported(found, args, device_type="cpu")


def test_an_average_of_the_weights_is_refused_only_where_they_are_in_parts() -> None:
    found, args = request(stage(2), ema_decay=0.9)
    ds.check_supported(found, args, device_type="cpu")


def test_an_optimizer_that_the_user_vouches_for_is_used() -> None:
    found, args = request(stage(2, zero_allow_untested_optimizer=True), optim="adafactor")
    ds.check_supported(found, args, device_type="cpu")


def test_two_optimizers_are_one_too_many() -> None:
    found, args = request(stage(2, optimizer={"type": "AdamW"}))
    with pytest.raises(ValueError, match="keep one"):
        ds.check_supported(found, args, device_type="cpu", client_optimizer=True)


def weights_after_steps(name: str, is_flat: bool) -> torch.Tensor:
    """Of a matrix and a vector after three steps, as they are or as one flat parameter."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4 * 3 + 5, generator=generator)
    model = nn.Module()
    if is_flat:
        model.flat = nn.Parameter(whole.clone())
    else:
        model.matrix, model.vector = nn.Parameter(whole[:12].clone().view(4, 3)), nn.Parameter(whole[12:].clone())
    args = arguments(optim=name, learning_rate=0.01)
    cls, kwargs = optimizer_class_and_kwargs(args, model)
    optimizer = build_optimizer(model, cls, dict(kwargs), [{"params": list(model.parameters())}])
    for _ in range(3):
        gradient, start = torch.randn(len(whole), generator=generator), 0
        for parameter in model.parameters():
            parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter).clone()
            start += parameter.numel()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("name", sorted(name for name in ds.ELEMENTWISE if ROWS[name].device is None))
def test_an_optimizer_in_the_list_steps_a_flat_part_as_it_steps_each_parameter(name: str) -> None:
    torch.testing.assert_close(weights_after_steps(name, True), weights_after_steps(name, False), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "grokadamw", "stable_adamw"])
def test_an_optimizer_that_is_not_in_the_list_may_step_a_flat_part_differently(name: str) -> None:
    assert name not in ds.ELEMENTWISE
    assert not torch.allclose(weights_after_steps(name, True), weights_after_steps(name, False), rtol=0, atol=1e-6)
