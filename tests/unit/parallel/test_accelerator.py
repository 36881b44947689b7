"""Arguments become an Accelerator."""

import pytest

from trainwright import TrainingArguments
from trainwright.parallel.accelerator import accelerator_arguments, build_accelerator

accelerate = pytest.importorskip("accelerate")


def arguments_of(tmp_path, **options):
    return accelerator_arguments(TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **options))


def test_the_loader_settings_of_the_arguments_arrive(tmp_path):
    config = {"split_batches": True, "dispatch_batches": True, "even_batches": False, "use_seedable_sampler": False}
    found = arguments_of(tmp_path, accelerator_config={**config, "non_blocking": True}, seed=5)["dataloader_config"]
    assert {name: getattr(found, name) for name in config} == config
    assert found.non_blocking and found.data_seed == 5
    assert arguments_of(tmp_path, seed=5, data_seed=6)["dataloader_config"].data_seed == 6


def test_updates_are_counted_once_by_the_loop(tmp_path):
    plugin = arguments_of(tmp_path, gradient_accumulation_steps=4)["gradient_accumulation_plugin"]
    assert (plugin.num_steps, plugin.sync_with_dataloader) == (1, False)


def test_what_the_user_says_about_accumulation_wins(tmp_path):
    config = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    assert arguments_of(tmp_path, accelerator_config=config)["gradient_accumulation_plugin"].sync_each_batch


@pytest.mark.parametrize(("options", "expected"), [({}, None), ({"bf16": True}, "bf16"), ({"fp16": True}, "fp16")])
def test_the_precision_is_that_of_the_arguments(tmp_path, options, expected):
    assert arguments_of(tmp_path, **options).get("mixed_precision") == expected


def test_an_accelerator_is_built_from_them(tmp_path):
    accelerator = build_accelerator(**arguments_of(tmp_path))
    assert isinstance(accelerator, accelerate.Accelerator) and accelerator.num_processes == 1
    assert accelerator.device.type == "cpu" and accelerator.gradient_accumulation_steps == 1
