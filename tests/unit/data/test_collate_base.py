"""Default collators: same batches as the installed transformers, clear errors for the rest."""

import numpy as np
import pytest
import torch

from trainwright.data.collate import (
    DataCollatorMixin,
    DefaultDataCollator,
    default_data_collator,
    tf_default_data_collator,
    to_numpy,
    tolist,
)

reference = pytest.importorskip("transformers.data.data_collator")

SAMPLES = {
    "class label": [{"label": 1, "x": [1, 2]}, {"label": 0, "x": [3, 4]}],
    "regression label": [{"label": 1.5, "x": 1.0}, {"label": 0.0, "x": 2.0}],
    "multi-label": [{"label": [1, 0]}, {"label": [0, 1]}],
    "boolean label": [{"label": True}, {"label": False}],
    "label ids": [{"label_ids": [1, 2], "x": 1}, {"label_ids": [0, 1], "x": 2}],
    "real label ids": [{"label_ids": [1.0, 2.0]}, {"label_ids": [0.0, 1.0]}],
    "both kinds of label": [{"label": 1, "label_ids": [1]}, {"label": 0, "label_ids": [1]}],
    "no label": [{"label": None, "x": 1}, {"label": None, "x": 1}],
    "strings and None": [{"labels": [1, 2], "s": "a", "n": None, "b": True}] * 2,
    "arrays": [{"x": np.array([1.0, 2.0])}, {"x": np.array([3.0, 4.0])}],
    "nested lists": [{"x": [[1, 2], [3, 4]]}] * 3,
}


def assert_same_batch(ours, theirs):
    assert list(ours) == list(theirs)
    for name in theirs:
        if isinstance(theirs[name], torch.Tensor | np.ndarray):
            assert type(ours[name]) is type(theirs[name])
            assert ours[name].dtype == theirs[name].dtype, name
            assert np.array_equal(np.asarray(ours[name]), np.asarray(theirs[name])), name
        else:
            assert ours[name] == theirs[name]


@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES.keys())
def test_a_batch_equals_that_of_the_installed_transformers(samples, framework):
    theirs = reference.default_data_collator(samples, return_tensors=framework)
    assert_same_batch(default_data_collator(samples, return_tensors=framework), theirs)
    assert_same_batch(DefaultDataCollator(return_tensors=framework)(samples), theirs)


def test_tensor_labels_keep_whole_numbers_whole():
    samples = [
        {"label": torch.tensor(1), "x": torch.tensor([1.0])},
        {"label": torch.tensor(0), "x": torch.tensor([2.0])},
    ]
    assert default_data_collator(samples)["labels"].dtype == torch.int64
    assert default_data_collator(samples, "np")["labels"].dtype == np.int64


FRACTIONS = [0, 0.5, 0.75, 1]
KINDS_OF_NUMBER = {
    "numbers": lambda value: value,
    "tensors": torch.tensor,
    "numpy scalars": lambda value: np.float64(value) if isinstance(value, float) else np.int64(value),
    "arrays": np.array,
    "a bool first": lambda value: False if value == 0 else value,
    "a tensor among numbers": lambda value: torch.tensor(value) if value == 0.5 else value,
    "a number among tensors": lambda value: value if value == 0.5 else torch.tensor(value),
}


@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("name", ["label", "label_ids", "labels", "score"])
@pytest.mark.parametrize("make", KINDS_OF_NUMBER.values(), ids=KINDS_OF_NUMBER.keys())
@pytest.mark.parametrize("size", [2, 4])
def test_no_fraction_is_cut_because_the_first_value_is_whole(framework, name, make, size):
    samples = [{name: make(value), "x": 1.0} for value in FRACTIONS]
    found = []
    for begin in range(0, 4, size):
        batch = default_data_collator(samples[begin : begin + size], framework)
        found += batch["labels" if name.startswith("label") else name].tolist()
    assert found == FRACTIONS


def test_rows_of_labels_are_not_cut_either_and_whole_ones_stay_whole():
    rows = [[0, 1], [0.5, 1]]
    for name in ("label_ids", "labels", "label"):
        for make in (list, np.array, torch.tensor, tuple):
            assert default_data_collator([{name: make(row)} for row in rows])["labels"].tolist() == rows
    for name in ("label", "label_ids", "labels"):
        assert default_data_collator([{name: value} for value in (0, True, 2)])["labels"].dtype == torch.int64
    assert default_data_collator([{"label": 0}, {"label": 0.5}])["labels"].dtype == torch.float32


def test_samples_may_be_objects_with_attributes():
    class Sample:
        def __init__(self, x):
            self.x = x

    assert default_data_collator([Sample([1]), Sample([2])])["x"].tolist() == [[1], [2]]


def test_samples_of_different_lengths_are_refused_with_the_column_and_the_cure():
    with pytest.raises(ValueError, match=r"'x' cannot be stacked.*DataCollatorWithPadding"):
        default_data_collator([{"x": [1]}, {"x": [1, 2]}])


def test_no_samples_and_samples_without_fields_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        default_data_collator([])
    with pytest.raises(TypeError, match="samples of type int"):
        default_data_collator([1, 2])


def test_tensorflow_and_unknown_frameworks_are_refused():
    for call in (lambda: tf_default_data_collator([{"x": 1}]), lambda: default_data_collator([{"x": 1}], "tf")):
        with pytest.raises(NotImplementedError, match='return_tensors="pt"'):
            call()
    with pytest.raises(ValueError, match=r"'pt2' is not supported.*Did you mean 'pt'"):
        default_data_collator([{"x": 1}], "pt2")


def test_the_mixin_calls_the_method_of_the_framework():
    class Collator(DataCollatorMixin):
        return_tensors = "pt"

        def torch_call(self, features):
            return "torch", features

    assert Collator()([1]) == ("torch", [1])
    with pytest.raises(NotImplementedError, match="numpy_call"):
        Collator()([1], return_tensors="np")


def test_conversions_take_tensors_arrays_and_lists():
    for value in (torch.tensor([1, 2]), np.array([1, 2]), [1, 2], (1, 2)):
        assert tolist(value) == [1, 2]
        assert isinstance(to_numpy(value), np.ndarray)
        assert to_numpy(value).tolist() == [1, 2]
