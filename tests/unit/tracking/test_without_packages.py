"""What trackers do themselves, where their packages are not installed."""

import signal
from types import SimpleNamespace

import pytest

from trainwright import TrainingArguments
from trainwright.interrupt import same_handlers
from trainwright.tracking.neptune import floats_as_annotated
from trainwright.tracking.swanlab import SwanLabCallback


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
    callback = SwanLabCallback.__new__(SwanLabCallback)
    callback._series, callback._said_repeated = {}, False
    sent = []
    callback._run = SimpleNamespace(log=lambda values, step: sent.append((step, values)))
    for step, value in ((1, 1.0), (2, 2.0), (2, 2.0), (2, 3.0), (2, 4.0), (1, 5.0), (3, 6.0)):
        callback.log_metrics({"x": value}, SimpleNamespace(global_step=step))
    assert [(step, values) for step, values in sent if values] == [
        (1, {"x": 1.0}),
        (2, {"x": 2.0}),
        (2, {"x#2": 3.0}),
        (2, {"x#3": 4.0}),
        (1, {"x#4": 5.0}),
        (3, {"x": 6.0}),
    ]
