"""When the default flow asks for a log line, an evaluation, a checkpoint, the end, compared with the reference."""

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from trainwright import TrainingArguments
from trainwright.callbacks.flow import DefaultFlowCallback, scheduled
from trainwright.names import IntervalStrategy, SaveStrategy
from trainwright.state import TrainerControl, TrainerState

FIELDS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


def arguments(**changes: Any) -> SimpleNamespace:
    settings: dict[str, Any] = {
        "logging_strategy": IntervalStrategy.NO,
        "eval_strategy": IntervalStrategy.NO,
        "save_strategy": SaveStrategy.NO,
        "logging_first_step": False,
        "eval_delay": 0,
    }
    return SimpleNamespace(**{**settings, **changes})


def asked(callback: Any, event: str, args: Any, state: Any, control: Any) -> set[str]:
    getattr(callback, event)(args, state, control)
    return {field for field in FIELDS if getattr(control, field)}


def flags(
    event: str, step: int, *, epoch: float = 1.0, max_steps: int = 100, interval: int = 3, **changes: Any
) -> set[str]:
    state = TrainerState(
        global_step=step,
        epoch=epoch,
        max_steps=max_steps,
        logging_steps=interval,
        eval_steps=interval,
        save_steps=interval,
    )
    return asked(DefaultFlowCallback(), event, arguments(**changes), state, TrainerControl())


@pytest.mark.parametrize(
    ("strategy", "field"),
    [("logging_strategy", "should_log"), ("eval_strategy", "should_evaluate"), ("save_strategy", "should_save")],
)
def test_a_steps_strategy_asks_at_multiples_of_its_interval_only(strategy: str, field: str) -> None:
    steps = [step for step in range(1, 13) if field in flags("on_step_end", step, **{strategy: "steps"})]
    assert steps == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("strategy", "field"),
    [("logging_strategy", "should_log"), ("eval_strategy", "should_evaluate"), ("save_strategy", "should_save")],
)
def test_an_epoch_strategy_asks_at_the_end_of_an_epoch_only(strategy: str, field: str) -> None:
    assert flags("on_epoch_end", 3, **{strategy: "epoch"}) == {field}
    assert flags("on_step_end", 3, **{strategy: "epoch"}) == set()


def test_the_first_step_is_logged_on_request_whatever_the_strategy() -> None:
    assert flags("on_step_end", 1, logging_first_step=True) == {"should_log"}
    assert flags("on_step_end", 2, logging_first_step=True) == set()


def test_the_last_step_ends_training_and_is_saved_and_evaluated_though_no_interval_is_due() -> None:
    assert flags("on_step_end", 10, max_steps=10, logging_strategy="steps") == {"should_training_stop"}
    last = flags("on_step_end", 10, max_steps=10, eval_strategy="steps", save_strategy="steps")
    assert last == {"should_training_stop", "should_evaluate", "should_save"}


def test_eval_delay_counts_steps_or_epochs_and_holds_at_the_last_step_too() -> None:
    assert flags("on_step_end", 3, eval_strategy="steps", eval_delay=4) == set()
    assert flags("on_step_end", 6, eval_strategy="steps", eval_delay=4) == {"should_evaluate"}
    assert flags("on_step_end", 6, max_steps=6, eval_strategy="steps", eval_delay=7) == {"should_training_stop"}
    assert flags("on_epoch_end", 3, epoch=1.0, eval_strategy="epoch", eval_delay=1.5) == set()
    assert flags("on_epoch_end", 6, epoch=2.0, eval_strategy="epoch", eval_delay=1.5) == {"should_evaluate"}


def test_a_delay_of_none_as_set_evaluate_leaves_it_is_no_delay() -> None:
    assert TrainingArguments("out").set_evaluate("steps", 3).eval_delay is None
    assert flags("on_step_end", 3, eval_strategy="steps", eval_delay=None) == {"should_evaluate"}
    assert flags("on_epoch_end", 3, epoch=1.0, eval_strategy="epoch", eval_delay=None) == {"should_evaluate"}
    state = TrainerState(global_step=2, epoch=0.5, max_steps=6, num_train_epochs=2, eval_steps=3, save_steps=3)
    for strategy in ("steps", "epoch"):
        none, zero = (arguments(eval_strategy=strategy, eval_delay=delay) for delay in (None, 0))
        assert scheduled(none, state) == scheduled(zero, state)


def test_a_save_interval_of_zero_saves_at_the_last_step_only() -> None:
    settings = {"interval": 0, "max_steps": 4, "save_strategy": "steps"}
    assert ["should_save" in flags("on_step_end", step, **settings) for step in (1, 2, 3, 4)] == [
        False,
        False,
        False,
        True,
    ]


def test_flags_that_others_set_are_left_alone() -> None:
    control = TrainerControl(should_log=True, should_epoch_stop=True)
    assert asked(
        DefaultFlowCallback(), "on_step_end", arguments(), TrainerState(global_step=1, max_steps=9), control
    ) == {"should_log", "should_epoch_stop"}


def test_the_flags_equal_those_of_the_reference_over_a_grid_of_settings() -> None:
    reference = pytest.importorskip("transformers.trainer_callback")
    newer = tuple(int(part) for part in pytest.importorskip("transformers").__version__.split(".")[:2]) >= (5, 0)
    num_compared = 0
    grid = itertools.product(("no", "steps", "epoch"), ("no", "steps", "epoch"), SaveStrategy, (False, True), (0, 2, 7))
    for logging, evaluation, saving, first, delay in grid:
        args = arguments(
            logging_strategy=IntervalStrategy(logging),
            eval_strategy=IntervalStrategy(evaluation),
            save_strategy=saving,
            logging_first_step=first,
            eval_delay=delay,
        )
        for event, step in itertools.product(("on_step_end", "on_epoch_end"), (1, 2, 3, 7, 10)):
            values = {"global_step": step, "epoch": step / 5, "max_steps": 10}
            values.update(logging_steps=2, eval_steps=3, save_steps=4)
            ours = asked(DefaultFlowCallback(), event, args, TrainerState(**values), TrainerControl())
            theirs = asked(
                reference.DefaultFlowCallback(),
                event,
                args,
                reference.TrainerState(**values),
                reference.TrainerControl(),
            )
            if not newer and step == 10 and event == "on_step_end":
                ours.discard("should_evaluate")  # older releases do not evaluate the last step
            assert ours == theirs, (args, event, step)
            num_compared += 1
    assert num_compared == 3 * 3 * 4 * 2 * 3 * 2 * 5


@pytest.mark.parametrize(("evaluates", "step", "expected"), [(False, 4, False), (True, 4, True), (False, 6, True)])
def test_a_generation_that_does_not_evaluate_at_the_last_step_still_does_where_it_is_a_multiple(
    evaluates, step, expected
):
    options = {"eval_strategy": IntervalStrategy.STEPS, "_evaluates_last_step": evaluates}
    asked_for = flags("on_step_end", step, max_steps=step, **options)
    assert ("should_evaluate" in asked_for) == expected and "should_training_stop" in asked_for


STRATEGIES = [IntervalStrategy.NO, IntervalStrategy.STEPS, IntervalStrategy.EPOCH]


@pytest.mark.parametrize("evaluates", STRATEGIES)
@pytest.mark.parametrize("saves", [SaveStrategy.NO, SaveStrategy.STEPS, SaveStrategy.EPOCH])
@pytest.mark.parametrize("delay", [0, 2, 7])
@pytest.mark.parametrize("at_end", [True, False])
def test_what_is_still_scheduled_is_what_the_flow_asks_for_in_the_rest_of_the_run(
    evaluates: Any, saves: Any, delay: int, at_end: bool
) -> None:
    steps_per_epoch, num_epochs = 4, 3
    args = arguments(eval_strategy=evaluates, save_strategy=saves, eval_delay=delay, _evaluates_last_step=at_end)
    for eval_steps, save_steps in ((3, 5), (4, 4), (50, 1)):
        state = TrainerState(
            max_steps=num_epochs * steps_per_epoch, num_train_epochs=num_epochs, epoch=0.0, logging_steps=1,
            eval_steps=eval_steps, save_steps=save_steps,
        )  # fmt: skip
        expected, found = [], []
        for step in range(1, state.max_steps + 1):
            state.global_step, state.epoch = step, step / steps_per_epoch
            asked_for = asked(DefaultFlowCallback(), "on_step_end", args, state, TrainerControl())
            if step % steps_per_epoch == 0:
                asked_for |= asked(DefaultFlowCallback(), "on_epoch_end", args, state, TrainerControl())
            expected.append(("should_evaluate" in asked_for, "should_save" in asked_for))
            found.append(scheduled(args, state))
        for step in range(1, state.max_steps + 1):
            rest = expected[step:]
            assert found[step - 1] == tuple(sum(one[kind] for one in rest) for kind in (0, 1)), step


def test_saves_of_the_best_cannot_be_foreseen_and_a_stream_ends_once() -> None:
    args = arguments(eval_strategy=IntervalStrategy.EPOCH, save_strategy=SaveStrategy.BEST)
    state = TrainerState(max_steps=10, num_train_epochs=sys.maxsize, epoch=0.5, global_step=5)
    assert scheduled(args, state) == (1, None)
