"""What a Trainer was given is checked before anything is built; `tests/loop/test_bad_input.py` has the messages."""

import inspect
import types

import pytest
import torch
from torch import nn

from trainwright import Trainer, TrainingArguments
from trainwright.checks import (
    check_given,
    check_label_names,
    check_optimizer,
    check_something_to_train,
    check_trainable,
    named_eval_set,
)


@pytest.fixture
def given(tmp_path):
    """The constructor's arguments as attributes."""

    def make(arguments=None, **changes):
        values = {
            "args": TrainingArguments(str(tmp_path), report_to="none", **(arguments or {})),
            "model": nn.Linear(1, 1),
            "train_dataset": [1],
        }
        names = [*inspect.signature(Trainer).parameters, "optimizer", "lr_scheduler"]
        return types.SimpleNamespace(**{**dict.fromkeys(names), **values, **changes})

    return make


def test_what_can_work_is_accepted(given):
    check_given(given(), makes_eval_loader=False)
    check_given(given(model=None, model_init=lambda: nn.Linear(1, 1)), makes_eval_loader=False)
    check_given(given(train_dataset=None), makes_eval_loader=False)


def test_a_loader_of_ones_own_needs_no_evaluation_set(given):
    asked = given({"eval_strategy": "epoch"})
    with pytest.raises(ValueError, match=r"eval_strategy='epoch'.*eval_dataset is None"):
        check_given(asked, makes_eval_loader=False)
    check_given(asked, makes_eval_loader=True)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"tp_size": 2}, "tp_size=2 does not divide the number of processes of this run, 1"),
        ({"tp_size": 2, "dp_replicate_size": 3}, "dp_replicate_size=3 x tp_size=2 does not divide"),
        ({"cp_size": 2}, r"cp_size=2 \(context parallel\) is not in this release"),
        ({"sp_size": 4}, r"sp_size=4 \(sequence parallel\) is not in this release"),
        ({"dp_shard_size": 2}, "dp_shard_size=2 shards the model, which fsdp='full_shard' does"),
    ],
)
def test_sizes_that_this_run_cannot_have_are_named_with_their_values(given, sizes, says):
    asked = given()
    for config in (sizes, types.SimpleNamespace(**sizes)):
        asked.args.parallelism_config = config
        with pytest.raises(ValueError, match=f"^parallelism_config: {says}"):
            check_given(asked, makes_eval_loader=False)


def test_sizes_of_one_are_as_none(given):
    asked = given()
    asked.args.parallelism_config = {"tp_size": 1, "cp_size": None}
    check_given(asked, makes_eval_loader=False)


def test_a_scheduler_of_a_model_that_is_not_there_yet_is_refused(given):
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(nn.Linear(1, 1).parameters()), lambda step: 1.0)
    with pytest.raises(ValueError, match=r"optimizers=.*optimizer_cls_and_kwargs="):
        check_given(
            given(model=None, model_init=lambda: nn.Linear(1, 1), lr_scheduler=scheduler), makes_eval_loader=False
        )


def test_batch_metrics_without_any_metric_are_refused(given):
    with pytest.raises(ValueError, match="compute_metrics is None"):
        check_given(given({"batch_eval_metrics": True}), makes_eval_loader=False)


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_a_result_in_place_of_a_function_is_named(given, name):
    with pytest.raises(TypeError, match=rf"{name}= must be a function; got a dict: {{'a': 1}}"):
        check_given(given(**{name: {"a": 1}}), makes_eval_loader=False)


def test_a_label_that_forward_does_not_take_is_named_with_the_nearest():
    class Model(nn.Module):
        def forward(self, x, labels=None): ...

    class Anything(nn.Module):
        def forward(self, **inputs): ...

    check_label_names(Model(), ["labels"])
    check_label_names(Anything(), ["lables"])
    with pytest.raises(ValueError, match=r"Model\.forward takes no argument 'lables'.*Did you mean 'labels'"):
        check_label_names(Model(), ["lables"])


def test_an_optimizer_of_another_model_is_refused():
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    check_optimizer(torch.optim.SGD([model.bias, *other.parameters()]), model)
    with pytest.raises(ValueError, match=r"\(SGD\) holds no parameter of the model"):
        check_optimizer(torch.optim.SGD(other.parameters()), model)


def test_one_trainable_parameter_is_enough():
    model = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match=r"Linear has nothing to train.*requires_grad_\(True\)"):
        check_something_to_train(model)
    model.bias.requires_grad_(True)
    check_something_to_train(model)


def test_a_quantised_model_needs_an_adapter():
    model = nn.Linear(1, 1)
    model.is_quantized = True
    with pytest.raises(ValueError, match=r"Linear is quantised.*peft"):
        check_trainable(model)
    model._hf_peft_config_loaded = True
    check_trainable(model)


def test_an_evaluation_set_is_picked_by_name():
    assert named_eval_set({"easy": [1], "hard": [2]}, "hard") == [2]
    with pytest.raises(ValueError, match=r"no evaluation set 'hart'.*\['easy', 'hard'\].*Did you mean 'hard'"):
        named_eval_set({"easy": [1], "hard": [2]}, "hart")
    with pytest.raises(ValueError, match=r"no evaluation set 'easy'; eval_dataset holds \[\]"):
        named_eval_set([1, 2], "easy")
