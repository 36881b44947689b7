"""AcceleratorConfig: defaults, sources, errors."""

import json

import pytest

from trainwright import TrainingArguments
from trainwright.args.accelerator_config import AcceleratorConfig

DEFAULTS = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "use_seedable_sampler": True,
    "non_blocking": False,
    "gradient_accumulation_kwargs": None,
    "use_configured_state": False,
}


def test_the_defaults_are_the_documented_ones():
    assert AcceleratorConfig().to_dict() == DEFAULTS == AcceleratorConfig.parse(None).to_dict()


@pytest.mark.parametrize(
    "value", [{"split_batches": True}, '{"split_batches": "true"}', AcceleratorConfig(split_batches=True)]
)
def test_every_source_gives_the_same_config(value):
    assert AcceleratorConfig.parse(value) == AcceleratorConfig(split_batches=True)


def test_it_is_read_from_a_file(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"non_blocking": True}))
    assert AcceleratorConfig.from_json_file(file).non_blocking is True
    assert AcceleratorConfig.parse(str(file)).non_blocking is True


def test_the_dict_is_a_copy_and_pop_removes_a_setting():
    config = AcceleratorConfig(gradient_accumulation_kwargs={"num_steps": 2})
    config.to_dict()["gradient_accumulation_kwargs"]["num_steps"] = 3
    assert config.pop("gradient_accumulation_kwargs") == {"num_steps": 2}
    assert "gradient_accumulation_kwargs" not in config.to_dict() and config.pop("gone", 5) == 5


@pytest.mark.parametrize(
    ("value", "error"),
    [(3, TypeError), (AcceleratorConfig, TypeError), ({"evn_batches": 1}, ValueError), ("x.json", ValueError)],
)
def test_what_it_cannot_be_is_an_error(value, error):
    with pytest.raises(error, match="accelerator_config"):
        AcceleratorConfig.parse(value)


def test_the_class_is_named_where_an_instance_is_needed():
    with pytest.raises(TypeError, match=r"AcceleratorConfig\(\)"):
        AcceleratorConfig.parse(AcceleratorConfig)


def arguments(settings, **options):
    return TrainingArguments(accelerator_config={"gradient_accumulation_kwargs": settings}, **options)


def test_num_steps_is_another_name_of_gradient_accumulation_steps():
    assert arguments({"num_steps": 4}).gradient_accumulation_steps == 4
    assert arguments({"num_steps": 4}, gradient_accumulation_steps=4).gradient_accumulation_steps == 4
    assert arguments({}, gradient_accumulation_steps=3).gradient_accumulation_steps == 3
    config = AcceleratorConfig(gradient_accumulation_kwargs={"num_steps": 5})
    assert TrainingArguments(accelerator_config=config).gradient_accumulation_steps == 5


def test_num_steps_and_gradient_accumulation_steps_that_differ_are_an_error():
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2 and num_steps=4"):
        arguments({"num_steps": 4}, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"num_stpes": 4}, ValueError, "Did you mean 'num_steps'"),
        ({"num_steps": 0}, ValueError, "num_steps=0 must be a whole number of at least 1"),
        ({"num_steps": True}, ValueError, "num_steps=True"),
        ({"num_steps": 2.0}, ValueError, "num_steps=2.0"),
        ({"sync_each_batch": "False"}, TypeError, "sync_each_batch='False' must be True or False"),
        ("num_steps", TypeError, "must be a dict"),
    ],
)
def test_accumulation_settings_that_accelerate_does_not_have_are_an_error(settings, error, text):
    with pytest.raises(error, match=text):
        arguments(settings)
