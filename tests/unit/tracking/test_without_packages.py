"""What trackers do themselves, where their packages are not installed."""

import signal

import pytest

from trainwright import TrainingArguments
from trainwright.interrupt import same_handlers
from trainwright.tracking.neptune import floats_as_annotated
from trainwright.tracking.swanlab import Curves


def test_handlers_that_a_library_takes_are_put_back_also_when_it_fails():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), same_handlers():
        signal.signal(signal.SIGTERM, lambda *_: None)
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_neptune_gets_a_float_where_the_arguments_take_one(tmp_path):
    args = TrainingArguments(str(tmp_path), weight_decay=0, max_grad_norm=1, seed=3, report_to="none", use_cpu=True)
    values = floats_as_annotated({"weight_decay": 0, "max_grad_norm": 1, "seed": 3, "do_train": True, "other": 2}, args)
    assert values == {"weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 3, "do_train": True, "other": 2}
    assert {name: type(value) for name, value in values.items()} == {
        "weight_decay": float, "max_grad_norm": float, "seed": int, "do_train": bool, "other": int,
    }  # fmt: skip


def test_swanlab_has_a_curve_of_its_own_for_values_at_a_step_that_has_one():
    curves = Curves()
    points = ((1, 1.0), (2, 2.0), (2, 2.0), (2, 3.0), (2, 4.0), (1, 5.0), (3, 6.0))
    assert [curves.place("x", step, value) for step, value in points] == ["x", "x", None, "x#2", "x#3", "x#4", "x"]
