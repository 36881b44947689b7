"""Flattening: one sequence out of a batch, as the installed transformers makes it."""

import inspect

import numpy as np
import pytest
import torch

from trainwright.data.collate import DataCollatorWithFlattening

reference = pytest.importorskip("transformers.data.data_collator")

SAMPLES = [{"input_ids": [2, 5, 6, 3], "labels": [1, 2, 3, 4]}, {"input_ids": [2, 9], "labels": [5, 6]}]


@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_position_ids": False},
        {"separator_id": -1, "return_flash_attn_kwargs": True, "return_seq_idx": True},
        {"position_ids_start": 3},
    ],
    ids=str,
)
def test_a_batch_equals_that_of_the_installed_transformers(options, labelled, framework):
    if not set(options) <= set(inspect.signature(reference.DataCollatorWithFlattening).parameters):
        pytest.skip("the installed release has no such option")
    samples = SAMPLES if labelled else [{"input_ids": sample["input_ids"]} for sample in SAMPLES]
    batch = DataCollatorWithFlattening(return_tensors=framework, **options)(samples)
    theirs = reference.DataCollatorWithFlattening(return_tensors=framework, **options)(samples)
    assert set(batch) == set(theirs)
    for name, value in theirs.items():
        assert np.array_equal(np.asarray(batch[name]), np.asarray(value)), name
        assert getattr(batch[name], "dtype", int) == getattr(value, "dtype", int)


def test_the_separator_of_the_call_wins_and_tensors_are_taken():
    samples = [{name: torch.tensor(value) for name, value in sample.items()} for sample in SAMPLES]
    assert DataCollatorWithFlattening()(samples, separator_id=-7)["labels"].tolist() == [[-7, 2, 3, 4, -7, 6]]


def test_offsets_and_positions_describe_the_samples():
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(SAMPLES)
    lengths = [len(sample["input_ids"]) for sample in SAMPLES]
    assert batch["cu_seq_lens_q"].diff().tolist() == lengths
    assert batch["max_length_k"] == max(lengths)
    assert batch["seq_idx"][0].bincount().tolist() == lengths
    assert (batch["position_ids"] == 0).sum() == len(SAMPLES)


def test_a_single_sample_is_flattened_and_the_framework_of_a_call_wins():
    for collator in (DataCollatorWithFlattening("np"), DataCollatorWithFlattening()):
        batch = collator(SAMPLES[:1], return_tensors="np")
        assert isinstance(batch["labels"], np.ndarray) and batch["labels"].tolist() == [[-100, 2, 3, 4]]
    assert isinstance(DataCollatorWithFlattening("np")(SAMPLES)["input_ids"], np.ndarray)
