"""Default collators: same batches as the installed transformers, clear errors for the rest."""

import types

import numpy as np
import pytest
import torch

from trainwright.data.collate import (
    DataCollatorMixin,
    DefaultDataCollator,
    default_data_collator,
    numpy_default_data_collator,
    tf_default_data_collator,
    to_numpy,
    tolist,
    torch_default_data_collator,
)
from trainwright.data.collate_base import as_mappings, warn_of_replaced_labels, whole_labels

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


@pytest.mark.parametrize(
    ("make", "torch_dtype"),
    [
        (np.uint8, torch.int64),
        (np.bool_, torch.int64),
        (np.int32, torch.int64),
        (np.float16, torch.float32),
        (lambda value: torch.tensor(value, dtype=torch.bool), torch.int64),
        (lambda value: torch.tensor(value, dtype=torch.uint8), torch.int64),
        (lambda value: torch.tensor(value, dtype=torch.float16), torch.float32),
        (lambda value: np.array(value, dtype=np.int16), torch.int64),
    ],
)
def test_a_label_is_a_class_where_it_is_whole_and_a_target_where_it_is_not(make, torch_dtype):
    samples = [{"label": make(1)}, {"label": make(0)}]
    found = default_data_collator(samples)["labels"]
    assert (found.dtype, found.tolist()) == (torch_dtype, [1, 0])
    arrays = default_data_collator(samples, "np")["labels"]
    assert str(arrays.dtype) == str(torch_dtype).removeprefix("torch.")


def test_label_ids_that_are_tensors_keep_their_type_and_others_do_not():
    for dtype in (torch.int32, torch.float64):
        rows = [{"label_ids": torch.tensor([1, 2], dtype=dtype)}] * 2
        assert default_data_collator(rows)["labels"].dtype == dtype
    assert default_data_collator([{"label_ids": [1, 2]}] * 2)["labels"].dtype == torch.int64
    assert default_data_collator([{"label": torch.tensor([1, 2])}] * 2)["labels"].dtype == torch.float32


def test_a_label_of_the_first_kind_hides_the_second_and_none_hides_nothing():
    rows = [{"label": 1, "label_ids": 5, "x": 0}] * 2
    batch = default_data_collator(rows)
    assert batch["labels"].tolist() == [1, 1] and batch.keys() == {"labels", "x"}
    assert default_data_collator([{"label": None, "label_ids": 5}] * 2)["labels"].tolist() == [5, 5]


def test_whole_labels_are_int64_in_either_framework_and_an_empty_row_is_one():
    for framework, kind in (("pt", torch.Tensor), ("np", np.ndarray)):
        found = whole_labels([[1.0, 2.0], [3.0, -100.0]], framework)
        assert isinstance(found, kind) and found.tolist() == [[1, 2], [3, -100]] and "int64" in str(found.dtype)
    assert whole_labels([True, False]).tolist() == [1, 0]
    assert whole_labels([]).dtype == torch.int64 and whole_labels([[], []]).shape == (2, 0)


def test_a_label_that_is_not_whole_is_named_by_its_row():
    with pytest.raises(ValueError, match=r"^labels hold 2\.5 in row 1 of a batch"):
        whole_labels([[1.0, 2.0], [3.0, 2.5]])
    with pytest.raises(ValueError, match=r"^order hold 0\.25 in row 2 of a batch"):
        whole_labels([1, 2, 0.25], name="order")


def test_columns_of_tensors_and_arrays_keep_their_type():
    tensors = [{"x": torch.tensor([1, 2], dtype=torch.int16)}, {"x": torch.tensor([3, 4], dtype=torch.int16)}]
    assert default_data_collator(tensors)["x"].dtype == torch.int16
    assert default_data_collator(tensors, "np")["x"].dtype == np.int16
    arrays = [{"x": np.array([1, 2], dtype=np.float16)}, {"x": np.array([3, 4], dtype=np.float16)}]
    assert default_data_collator(arrays)["x"].dtype == torch.float16
    assert default_data_collator([{"x": torch.tensor(1.5)}, {"x": 2}])["x"].tolist() == [1.5, 2]


def test_tensors_of_different_shapes_are_refused_with_the_reason():
    for make in (torch.tensor, np.array, list):
        for framework in ("pt", "np"):
            with pytest.raises(ValueError, match=r"The samples' 'x' cannot be stacked into one batch: .*different"):
                default_data_collator([{"x": make([1, 2])}, {"x": make([1])}], framework)


def test_samples_are_taken_as_any_sequence_of_mappings_or_objects():
    rows = (types.MappingProxyType({"x": 1}),)
    assert as_mappings(rows) == [{"x": 1}] and type(as_mappings(rows)) is list
    assert as_mappings([types.SimpleNamespace(x=1), types.SimpleNamespace(x=2)]) == [{"x": 1}, {"x": 2}]


def test_arrays_come_off_the_graph():
    assert to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1, 1]


def warned(monkeypatch, caplog, rows, worker=None, times=1):
    info = None if worker is None else types.SimpleNamespace(id=worker)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: info)
    collator = DefaultDataCollator()
    caplog.clear()
    for _ in range(times):
        warn_of_replaced_labels(collator, rows, "Use another.")
    return [record.getMessage() for record in caplog.records]


OTHER_LABELS = [{"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": None}, {"input_ids": [1, 2], "labels": [1, 3]}]


def test_replaced_labels_are_warned_of_once_by_one_process(monkeypatch, caplog):
    (text,) = warned(monkeypatch, caplog, OTHER_LABELS * 2, times=3)
    assert text.startswith("DefaultDataCollator makes labels itself") and text.endswith("Use another.")
    assert len(warned(monkeypatch, caplog, OTHER_LABELS, worker=0)) == 1
    assert warned(monkeypatch, caplog, OTHER_LABELS, worker=1) == []


def test_labels_that_are_the_tokens_or_cannot_be_looked_at_are_not_warned_of(monkeypatch, caplog):
    rows = [[1, 2], {"input_ids": np.array([1, 2]), "labels": torch.tensor([1, 2])}, {"input_ids": [1], "labels": [1]}]
    assert warned(monkeypatch, caplog, rows) == []


def test_the_framework_of_a_call_wins_over_that_of_a_collator():
    class Collator(DataCollatorMixin):
        return_tensors = "np"

        def torch_call(self, features):
            return "torch"

        def numpy_call(self, features):
            return "numpy", features

    assert Collator()([1]) == ("numpy", [1]) and Collator()([1], return_tensors="pt") == "torch"
    for call in (lambda: Collator().tf_call([1]), lambda: Collator()([1], "tf")):
        with pytest.raises(NotImplementedError, match="TensorFlow"):
            call()
    with pytest.raises(NotImplementedError, match="DataCollatorMixin defines no torch_call"):
        DataCollatorMixin().torch_call([1])
    assert isinstance(DefaultDataCollator("np")([{"x": 1}], "pt")["x"], torch.Tensor)
    assert isinstance(DefaultDataCollator()([{"x": 1}])["x"], torch.Tensor)


def test_each_default_collator_makes_its_kind_of_batch_also_of_a_single_sample():
    for collate, kind in ((torch_default_data_collator, torch.Tensor), (numpy_default_data_collator, np.ndarray)):
        batch = collate([{"x": [1, 2], "label": 3}])
        assert {name: (type(value), value.tolist()) for name, value in batch.items()} == {
            "x": (kind, [[1, 2]]),
            "labels": (kind, [3]),
        }
    with pytest.raises(TypeError, match="samples of type int"):
        as_mappings([1])
    with pytest.raises(ValueError, match="The samples' 'label' cannot be stacked"):
        default_data_collator([{"label": [1, 2]}, {"label": [1]}])


def test_a_list_of_a_tensor_holds_numbers():
    for value in (torch.tensor([1, 2]), np.array([1, 2])):
        assert [type(item) for item in tolist(value)] == [int, int]
