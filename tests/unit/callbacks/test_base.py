"""The documented loop, its events and the pattern made of it."""

import inspect

import pytest

from documented_order import documented_events, documented_order
from trainwright.callbacks.base import EVENTS, TrainerCallback
from trainwright.state import TrainerControl, TrainerState


def joined(events: list[str]) -> str:
    return "".join(f"{event} " for event in events)


def one_step(num_micro_batches: int, *after: str) -> list[str]:
    update = ["on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    return ["on_step_begin", *["on_substep_end"] * (num_micro_batches - 1), *update, *after]


def test_the_documented_loop_names_every_event_of_the_class_and_no_other() -> None:
    methods = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    assert sorted(documented_events()) == sorted(EVENTS) == sorted(methods)
    assert len(EVENTS) == 16


def test_every_event_takes_args_state_control_and_keywords_and_returns_nothing() -> None:
    for event in EVENTS:
        method = getattr(TrainerCallback(), event)
        parameters = list(inspect.signature(method).parameters.values())
        assert [p.name for p in parameters[:3]] == ["args", "state", "control"], event
        assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD, event
        assert method(None, TrainerState(), TrainerControl(), model=None) is None


def test_the_documented_order_accepts_a_run_with_accumulation_evaluation_and_saving() -> None:
    evaluation = ["on_prediction_step", "on_prediction_step", "on_log", "on_evaluate"]
    run = ["on_train_begin", *evaluation]
    for _ in range(2):
        run += ["on_epoch_begin", *one_step(3, "on_log", *evaluation, *evaluation, "on_save"), *one_step(3)]
        run += ["on_epoch_end", *evaluation]
    run += ["on_log", "on_train_end"]
    assert documented_order("train").fullmatch(joined(run))


@pytest.mark.parametrize(
    "run",
    [
        ["on_train_begin", "on_log"],  # no end
        ["on_train_begin", "on_train_end"],  # no final log line
        [
            "on_train_begin",
            "on_epoch_begin",
            *one_step(1, "on_save", "on_log"),
            "on_epoch_end",
            "on_log",
            "on_train_end",
        ],
        ["on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_epoch_end", "on_log", "on_train_end"],
        ["on_train_begin", *one_step(1), "on_log", "on_train_end"],  # a step outside an epoch
    ],
)
def test_the_documented_order_rejects_a_run_in_another_order(run: list[str]) -> None:
    assert documented_order("train").fullmatch(joined(run)) is None


def test_each_heading_of_the_documented_loop_has_its_own_pattern() -> None:
    assert documented_order("init").fullmatch("on_init_end ")
    assert documented_order("push").fullmatch("on_push_begin ")
    assert documented_order("predict").fullmatch("on_prediction_step on_prediction_step on_predict ")
    assert documented_order("evaluate").fullmatch("on_prediction_step on_log on_evaluate ")
    assert not documented_order("evaluate").fullmatch("on_prediction_step on_evaluate on_log ")
    with pytest.raises(KeyError):
        documented_order("no such heading")
