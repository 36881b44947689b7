"""A copied function computes the same, and leaves the original as it was."""

import collections
import threading

import numpy as np
import pytest
import torch

from trainwright.evaluation.copies import CannotCopy, copied, strings_of
from trainwright.metrics import StreamingMetric

SEEN, COUNT, NAME = [], collections.Counter(), "named_by_a_global"


def helper():
    SEEN.append(1)
    COUNT["calls"] += 1
    return len(SEEN)


def with_helper(value):
    with_helper.calls = getattr(with_helper, "calls", 0) + 1
    return {"accuracy": helper(), NAME: with_helper.calls}


def test_globals_that_a_function_and_its_helpers_name_are_copied():
    copy = copied(with_helper)
    assert [copy(0)["accuracy"], copy(0)["accuracy"]] == [1, 2]
    assert not SEEN and not COUNT and not with_helper.__dict__


def test_what_was_one_object_is_one_object_in_the_copies():
    held = []
    first, second = copied((lambda: held.append(1), lambda: len(held)))
    first()
    assert second() == 1 and not held


def test_a_function_that_names_itself_and_keyword_defaults_are_copied():
    def count(value, *, start=[]):  # noqa: B006
        start.append(value)
        return len(start) if value == 0 else count(value - 1)

    assert copied(count)(2) == 3


def test_large_arrays_models_data_sets_and_classes_are_shared():
    class Mine(torch.utils.data.Dataset):
        pass

    large, small, data = np.zeros(2**23, dtype=np.uint16), np.zeros(3), Mine()
    got = copied(lambda: (large, small, data, Mine))()
    assert got[0] is large and got[1] is not small and got[2] is data and got[3] is Mine


@pytest.mark.parametrize("held", [threading.Lock(), (each for each in "ab"), [0.5] * 2**22])
def test_what_cannot_be_copied_says_so(held):
    with pytest.raises(CannotCopy):
        copied(lambda: held)


class Total(StreamingMetric):
    total = 0


def test_a_streaming_metric_is_copied():
    metric = Total()
    copied([metric])[0].total = 5
    assert metric.total == 0


def test_the_names_that_code_gives_are_found_through_helpers_partials_and_objects():
    class Called:
        def __call__(self, value):
            return {"by_keyword": 1}

    names = ["listed"]
    assert strings_of([with_helper, Called(), lambda: [{name: len(name)} for name in names]]) >= {
        "accuracy", "calls", "named_by_a_global", "by_keyword", "listed",
    }  # fmt: skip
