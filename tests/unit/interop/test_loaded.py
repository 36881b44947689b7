"""Objects of other libraries are recognised without importing those."""

import subprocess
import sys

import pytest
from torch import nn

from trainwright.interop.loaded import (
    is_hf_dataset,
    is_hf_iterable_dataset,
    is_instance_of,
    is_peft_model,
    is_pretrained_model,
)


def test_an_instance_is_one_of_any_of_the_named_classes():
    import collections

    assert is_instance_of(collections.OrderedDict(), "collections", "Counter", "OrderedDict")
    assert not is_instance_of({}, "collections", "Counter", "OrderedDict")
    assert not is_instance_of({}, "collections", "no_such_name", "namedtuple")  # none of them a class
    assert not is_instance_of({}, "a_module_that_is_not_loaded", "Anything")


def test_plain_objects_belong_to_nobody():
    for ask in (is_pretrained_model, is_peft_model, is_hf_dataset, is_hf_iterable_dataset):
        assert not ask(nn.Linear(1, 1)) and not ask(None) and not ask([1])


def test_models_of_transformers_and_peft_are_told_apart():
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    assert is_pretrained_model(model) and not is_peft_model(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["c_attn"]))
    assert is_peft_model(adapted) and not is_pretrained_model(adapted)


def test_data_sets_are_told_apart():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": [1, 2]})
    assert is_hf_dataset(data) and not is_hf_iterable_dataset(data)
    assert is_hf_iterable_dataset(data.to_iterable_dataset()) and not is_hf_dataset(data.to_iterable_dataset())


def test_asking_imports_nothing():
    code = (
        "import sys; from trainwright.interop import loaded as l\n"
        "[ask(3) for ask in (l.is_pretrained_model, l.is_peft_model, l.is_hf_dataset, l.is_hf_iterable_dataset)]\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
