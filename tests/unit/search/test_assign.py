"""Writing the values of a trial into arguments."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

import numpy as np
import pytest
import torch

from trainwright.names import SchedulerType
from trainwright.search.assign import apply_trial


@dataclass
class Arguments:
    learning_rate: float = 5e-5
    warmup_steps: float = 0  # the value is an int, the field is not
    num_train_epochs: float = 3.0
    seed: int = 42
    max_grad_norm: float | None = 1.0
    save_total_limit: int | None = None
    bf16: bool = False
    load_best_model_at_end: bool = False
    lr_scheduler_type: Union[SchedulerType, str] = SchedulerType.LINEAR  # noqa: UP007 - older spelling
    neftune_noise_alpha: Optional[float] = None  # noqa: UP045
    fsdp: Union[bool, str, None] = None  # noqa: UP007
    optim_args: str | None = None
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=dict)
    label_names: list[str] | None = None
    anything: Any = None
    mode: Literal["max", "min"] = "max"


TABLE = [
    ("warmup_steps", 0.1, 0.1),
    ("warmup_steps", 100, 100.0),
    ("num_train_epochs", 2, 2.0),
    ("seed", 3.0, 3),
    ("seed", "17", 17),
    ("seed", np.int64(5), 5),
    ("learning_rate", np.float32(0.5), 0.5),
    ("learning_rate", torch.tensor(0.25), 0.25),
    ("learning_rate", "1e-4", 1e-4),
    ("bf16", "False", False),
    ("bf16", "true", True),
    ("bf16", "no", False),
    ("bf16", "off", False),
    ("bf16", "0", False),
    ("bf16", "yes", True),
    ("bf16", 1, True),
    ("bf16", 0.0, False),
    ("bf16", True, True),
    ("save_total_limit", None, None),
    ("save_total_limit", 2.0, 2),
    ("max_grad_norm", None, None),
    ("max_grad_norm", 1, 1.0),
    ("neftune_noise_alpha", 5, 5.0),
    ("lr_scheduler_type", "cosine", SchedulerType.COSINE),
    ("fsdp", "full_shard", "full_shard"),
    ("fsdp", True, True),
    ("optim_args", "rank=8", "rank=8"),
    ("optim_args", 8, "8"),
    ("lr_scheduler_kwargs", {"num_cycles": 2}, {"num_cycles": 2}),
    ("label_names", ["labels"], ["labels"]),
    ("anything", 3.5, 3.5),
    ("mode", "min", "min"),
]


@pytest.mark.parametrize(("name", "value", "expected"), TABLE)
def test_a_value_becomes_what_its_field_declares(name, value, expected):
    args = Arguments()
    apply_trial(args, {name: value})
    assert getattr(args, name) == expected
    assert type(getattr(args, name)) is type(expected)


BAD = [
    ("seed", 0.1, "int"),
    ("seed", "many", "int"),
    ("seed", None, "int"),
    ("bf16", "maybe", "bool"),
    ("bf16", 2, "bool"),
    ("learning_rate", "fast", "float"),
    ("learning_rate", True, "float"),
    ("save_total_limit", 1.5, "int or None"),
    ("lr_scheduler_type", "cosin", "cosine"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_a_value_that_does_not_fit_is_an_error_that_says_what_does(name, value, allowed):
    with pytest.raises(ValueError, match=allowed):
        apply_trial(Arguments(), {name: value})


def test_nothing_is_set_where_one_value_is_bad():
    args = Arguments()
    with pytest.raises(ValueError, match="seed"):
        apply_trial(args, {"learning_rate": 1.0, "seed": 0.5})
    assert args == Arguments()


def test_an_unknown_name_is_reported_with_the_nearest_one_and_skipped(caplog):
    args = Arguments()
    with caplog.at_level(logging.WARNING, logger="trainwright.search.assign"):
        apply_trial(args, {"lerning_rate": 0.5, "seed": 1})
    assert "'lerning_rate'" in caplog.text and "'learning_rate'" in caplog.text
    assert args == Arguments(seed=1)
    assert not hasattr(args, "lerning_rate")


def test_a_subclass_of_the_arguments_keeps_the_types_of_its_base():
    @dataclass
    class Mine(Arguments):
        temperature: float = 1.0

    args = Mine()
    apply_trial(args, {"warmup_steps": 0.1, "temperature": 2})
    assert (args.warmup_steps, args.temperature) == (0.1, 2.0)


def test_without_usable_annotations_a_float_is_not_cut_to_the_int_that_stands_there():
    class Plain:
        def __init__(self) -> None:
            self.warmup_steps = 0
            self.flag = False
            self.limit = None

    args = Plain()
    apply_trial(args, {"warmup_steps": 0.1, "flag": "False", "limit": 4})
    assert (args.warmup_steps, args.flag, args.limit) == (0.1, False, 4)
