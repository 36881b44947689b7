"""Names, fields and signatures of collators and samplers: those of the installed transformers, and frozen lists."""

import dataclasses
import inspect

import pytest

from trainwright.data import collate, samplers

COLLATORS = [
    "DataCollator",
    "DataCollatorForLanguageModeling",
    "DataCollatorForMultipleChoice",
    "DataCollatorForPermutationLanguageModeling",
    "DataCollatorForSOP",
    "DataCollatorForSeq2Seq",
    "DataCollatorForTokenClassification",
    "DataCollatorForWholeWordMask",
    "DataCollatorMixin",
    "DataCollatorWithFlattening",
    "DataCollatorWithPadding",
    "DefaultDataCollator",
    "InputDataClass",
    "_numpy_collate_batch",
    "_tf_collate_batch",
    "_torch_collate_batch",
    "default_data_collator",
    "numpy_default_data_collator",
    "pad_without_fast_tokenizer_warning",
    "tf_default_data_collator",
    "to_numpy",
    "tolist",
    "torch_default_data_collator",
]
SAMPLERS = [
    "BatchRebalanceSampler",
    "DistributedLengthGroupedSampler",
    "DistributedSamplerWithLoop",
    "IterableDatasetShard",
    "LengthGroupedSampler",
    "SequentialDistributedSampler",
    "ShardSampler",
    "get_dataloader_sampler",
    "get_length_grouped_indices",
    "get_tpu_sampler",
]
OLDER_FIELDS = {"tf_experimental_compile"}  # a field of generation 4 that a call may still pass


def parameters(callable_):
    return {p.name: p.default for p in inspect.signature(callable_).parameters.values()}


def of_reference(module, name):
    found = getattr(pytest.importorskip(module), name, None)
    if found is None:
        pytest.skip("the installed release has no such name")
    return found


def test_the_lists_of_names_are_complete():
    assert sorted(collate.__all__) == sorted(COLLATORS)
    assert set(SAMPLERS) <= set(samplers.__all__)
    assert all(hasattr(module, name) for module in (collate, samplers) for name in module.__all__)


@pytest.mark.parametrize("name", [name for name in COLLATORS if name not in ("DataCollator", "InputDataClass")])
def test_collators_take_the_arguments_of_the_installed_transformers(name):
    theirs = of_reference("transformers.data.data_collator", name)
    ours = getattr(collate, name)
    if dataclasses.is_dataclass(theirs):
        fields = {field.name: field.default for field in dataclasses.fields(ours)}
        expected = {field.name: field.default for field in dataclasses.fields(theirs)}
        assert expected.items() <= fields.items()
        assert set(fields) - set(expected) <= {*OLDER_FIELDS, "whole_word_mask"}
    taken, expected = parameters(ours), parameters(theirs)
    assert expected.items() <= taken.items()
    shared = [parameter for parameter in taken if parameter in expected]
    if set(taken) <= set(expected) | OLDER_FIELDS:
        assert shared == list(expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_take_the_arguments_of_the_installed_transformers(name):
    theirs = of_reference("transformers.trainer_pt_utils", name)
    taken, expected = parameters(getattr(samplers, name)), parameters(theirs)
    assert list(taken)[: len(expected)] == list(expected)
    assert expected.items() <= taken.items()
