"""Who is called at an event, with what, and what becomes of the answer."""

import functools
import logging
import re
from typing import Any

import pytest

from trainwright.callbacks.base import EVENTS, TrainerCallback
from trainwright.callbacks.flow import DefaultFlowCallback
from trainwright.callbacks.handler import CONTROL_FIELDS, CallbackHandler
from trainwright.callbacks.progress import PrinterCallback
from trainwright.state import TrainerControl, TrainerState


class Recorder(TrainerCallback):
    """Records what it receives at the end of a step."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.received.append(kwargs)


class Answering(TrainerCallback):
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.answer


def handler_of(*callbacks: Any) -> CallbackHandler:
    return CallbackHandler([DefaultFlowCallback, *callbacks], "model", "tokenizer", "optimizer", "schedule")


def call(handler: CallbackHandler, event: str = "on_step_end", control: TrainerControl | None = None) -> TrainerControl:
    state = TrainerState(global_step=1, max_steps=9)
    handler.remove_callback(DefaultFlowCallback)  # it reads arguments, and these tests pass none
    return getattr(handler, event)(None, state, control or TrainerControl())


def test_only_callbacks_that_override_an_event_listen_to_it() -> None:
    recorder = Recorder()
    handler = handler_of(recorder, TrainerCallback())
    assert handler.listeners["on_step_end"] == (handler.callbacks[0].on_step_end, recorder.on_step_end)
    assert handler.listeners["on_epoch_end"] == (handler.callbacks[0].on_epoch_end,)
    silent = set(EVENTS) - {"on_step_end", "on_epoch_end"}
    assert all(handler.listeners[event] == () for event in silent) and set(handler.listeners) == set(EVENTS)


def test_the_dispatch_table_follows_add_pop_and_remove() -> None:
    handler = handler_of()
    recorder = Recorder()
    before = len(handler.listeners["on_step_end"])
    handler.add_callback(recorder)
    assert len(handler.listeners["on_step_end"]) == before + 1
    assert handler.pop_callback(Recorder) is recorder
    assert len(handler.listeners["on_step_end"]) == before
    handler.remove_callback(DefaultFlowCallback)
    assert handler.listeners["on_step_end"] == ()


def test_an_event_set_on_an_instance_counts_as_override() -> None:
    callback = TrainerCallback()
    seen: list[int] = []
    callback.on_epoch_begin = lambda args, state, control, **kwargs: seen.append(state.global_step)  # type: ignore
    call(handler_of(callback), "on_epoch_begin")
    assert seen == [1]


def test_an_event_set_after_adding_is_heard_after_a_refresh() -> None:
    callback = TrainerCallback()
    handler = handler_of(callback)
    callback.on_save = lambda *args, **kwargs: None  # type: ignore[method-assign]
    assert handler.listeners["on_save"] == ()
    handler.refresh_listeners()
    assert len(handler.listeners["on_save"]) == 1


def test_an_inherited_override_counts_and_a_base_class_of_other_libraries_does_not() -> None:
    reference = pytest.importorskip("transformers.trainer_callback")

    class Child(Recorder):
        pass

    class Foreign(reference.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    handler = handler_of(Child, Foreign)
    foreign = handler.callbacks[-1]
    assert [event for event in EVENTS if foreign.on_log in handler.listeners[event]] == ["on_log"]
    assert not any(getattr(foreign, event, None) in handler.listeners[event] for event in EVENTS if event != "on_log")
    assert handler.callbacks[1].on_step_end in handler.listeners["on_step_end"]


def test_a_user_class_that_happens_to_be_named_trainer_callback_is_heard() -> None:
    namesake = type("TrainerCallback", (TrainerCallback,), {"on_save": lambda self, *args, **kwargs: None})
    assert len(handler_of(namesake).listeners["on_save"]) == 1


def test_a_proxy_that_answers_through_getattr_is_heard() -> None:
    class Proxy:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    recorder = Recorder()
    call(handler_of(Proxy(recorder)))
    assert len(recorder.received) == 1


def test_a_callback_put_into_the_list_by_hand_is_called_from_the_next_event_on() -> None:
    recorder = Recorder()
    handler = handler_of()
    call(handler)
    handler.callbacks.append(recorder)
    call(handler)
    assert len(recorder.received) == 1


def test_a_callback_replaced_in_the_list_is_called_and_the_one_before_it_no_longer() -> None:
    before, after = Recorder(), Recorder()
    handler = handler_of(before)
    call(handler)
    handler.callbacks[handler.callbacks.index(before)] = after  # the list is as long as before
    call(handler)
    assert (len(before.received), len(after.received)) == (1, 1)


def test_callbacks_receive_the_parts_of_the_run_by_keyword_and_see_later_changes() -> None:
    recorder = Recorder()
    handler = handler_of(recorder)
    call(handler)
    handler.optimizer, handler.train_dataloader, handler.processing_class = "other", "batches", "processor"
    call(handler)
    names = {
        "model",
        "processing_class",
        "tokenizer",
        "optimizer",
        "lr_scheduler",
        "train_dataloader",
        "eval_dataloader",
    }
    first, second = recorder.received
    assert set(first) == names and first["optimizer"] == "optimizer" and first["tokenizer"] == "tokenizer"
    assert (second["optimizer"], second["train_dataloader"]) == ("other", "batches")
    assert second["processing_class"] == second["tokenizer"] == handler.tokenizer == "processor"


def test_what_a_callback_does_to_its_keywords_reaches_no_other() -> None:
    class Greedy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs.clear()

    recorder = Recorder()
    call(handler_of(Greedy, recorder))
    assert recorder.received[0]["model"] == "model"


def test_logs_and_metrics_arrive_by_keyword_whether_passed_by_position_or_by_name() -> None:
    class Listener(TrainerCallback):
        heard: list[Any]

        def __init__(self) -> None:
            self.heard = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.heard.append(logs)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            self.heard.append((metrics, kwargs["extra"]))

    listener = Listener()
    handler = handler_of(listener)
    handler.on_log(None, TrainerState(), TrainerControl(), {"loss": 1.0})
    handler.on_evaluate(None, TrainerState(), TrainerControl(), metrics={"eval_loss": 2.0}, extra=3)
    assert listener.heard == [{"loss": 1.0}, ({"eval_loss": 2.0}, 3)]


RESETS = {
    "on_train_begin": {"should_training_stop"},
    "on_epoch_begin": {"should_epoch_stop"},
    "on_step_begin": {"should_log", "should_evaluate", "should_save"},
    "on_evaluate": {"should_evaluate"},
    "on_save": {"should_save"},
    "on_log": {"should_log"},
}


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_resets_the_documented_fields_of_control_and_no_others(event: str) -> None:
    control = call(handler_of(), event, TrainerControl(True, True, True, True, True))
    assert {field for field in CONTROL_FIELDS if not getattr(control, field)} == RESETS.get(event, set())


def test_a_field_is_reset_before_callbacks_see_it_so_that_they_can_set_it_again() -> None:
    class LogAgain(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
            assert control.should_log is False
            control.should_log = True

    assert call(handler_of(LogAgain), "on_log").should_log is True


def test_a_returned_control_replaces_the_control_for_later_callbacks() -> None:
    replacement = TrainerControl(should_save=True)
    seen: list[TrainerControl] = []
    later = TrainerCallback()
    later.on_step_end = lambda args, state, control, **kwargs: seen.append(control)  # type: ignore
    assert call(handler_of(Answering(replacement), later)) is replacement
    assert seen == [replacement] and seen[0] is replacement


def test_a_returned_dict_sets_the_fields_it_names() -> None:
    control = TrainerControl(should_save=True)
    assert call(handler_of(Answering({"should_training_stop": True})), control=control) is control
    assert control == TrainerControl(should_training_stop=True, should_save=True)
    assert call(handler_of(Answering({})), control=TrainerControl()) == TrainerControl()
    assert call(handler_of(Answering(None)), control=TrainerControl()) == TrainerControl()


def test_an_unknown_field_in_a_returned_dict_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(
        ValueError, match=r"Answering\.on_step_end.*'should_stop_training'.*Did you mean 'should_training_stop'"
    ):
        call(handler_of(Answering({"should_stop_training": True})))


def test_any_other_answer_is_an_error_naming_callback_and_event() -> None:
    with pytest.raises(TypeError, match=r"Answering\.on_step_end returned True"):
        call(handler_of(Answering(True)))


@pytest.mark.parametrize("wrong", [lambda: None, 3, "ProgressCallback", object()])
def test_what_is_no_callback_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="is not a callback"):
        handler_of().add_callback(wrong)


def test_an_event_that_cannot_be_called_is_warned_of_with_its_place_before_it_happens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Saves(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any) -> None: ...

    class Positions(TrainerCallback):
        def on_log(self, args: Any, state: Any, **kwargs: Any) -> None: ...

    for callback, event in ((Saves(), "on_save"), (Positions, "on_log")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            handler_of(callback)
        assert re.search(rf"{event}\(.*test_handler\.py:\d+\) cannot be called.*Write def {event}\(", caplog.text)


def test_an_event_in_a_wrapper_that_takes_what_it_is_called_with_is_accepted() -> None:
    def once(function: Any) -> Any:
        @functools.wraps(function)
        def called(self: Any, *args: Any, **kwargs: Any) -> None:
            function(self)

        return called

    class Counts(TrainerCallback):
        count = 0

        @once
        def on_step_end(self) -> None:
            self.count += 1

    counts = Counts()
    call(handler_of(counts))
    assert counts.count == 1


def test_a_class_that_needs_arguments_is_refused_with_the_way_to_pass_it() -> None:
    with pytest.raises(
        TypeError, match=r"Answering cannot be constructed without arguments.*callbacks=\[Answering\(\.\.\.\)\]"
    ):
        handler_of().add_callback(Answering)


def test_a_second_callback_of_a_class_is_added_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    handler = handler_of(Recorder)
    with caplog.at_level(logging.WARNING):
        handler.add_callback(Recorder())
    assert f"A callback {Recorder} is added, but there is already one" in caplog.text
    assert handler.callback_list == "DefaultFlowCallback\nRecorder\nRecorder"


def test_a_missing_default_flow_is_warned_about_and_a_subclass_of_it_is_enough(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class OwnFlow(DefaultFlowCallback):
        pass

    with caplog.at_level(logging.WARNING):
        CallbackHandler([OwnFlow], None, None, None, None)
        assert caplog.text == ""
        CallbackHandler([Recorder], None, None, None, None)
    assert "no DefaultFlowCallback among the callbacks (Recorder)" in caplog.text


def test_pop_and_remove_take_an_instance_a_class_or_a_base_class_and_ignore_what_is_absent() -> None:
    first, second = Recorder(), Recorder()
    handler = handler_of(first, second)
    handler.remove_callback(second)
    assert first in handler.callbacks and second not in handler.callbacks
    assert handler.pop_callback(PrinterCallback) is None
    handler.remove_callback(PrinterCallback)
    handler.remove_callback(second)
    assert handler.pop_callback(TrainerCallback) is not None
    assert handler.pop_callback(first) is first
    assert handler.callbacks == []


def test_a_class_of_the_reference_removes_ours_of_the_same_name() -> None:
    reference = pytest.importorskip("transformers.trainer_callback")
    handler = handler_of(PrinterCallback)
    handler.remove_callback(reference.PrinterCallback)
    assert handler.callback_list == "DefaultFlowCallback"


def test_call_event_reaches_an_event_of_the_users_own_and_names_the_nearest_for_a_misspelt_one() -> None:
    class Rollouts(TrainerCallback):
        def on_rollout_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> dict[str, bool]:
            return {"should_log": kwargs["reward"] > 1}

    handler = handler_of(Rollouts)
    control = handler.call_event("on_rollout_end", None, TrainerState(), TrainerControl(), reward=2)
    assert control.should_log
    with pytest.raises(ValueError, match=r"'on_step_ends'.*Did you mean 'on_step_end'"):
        handler.call_event("on_step_ends", None, TrainerState(), TrainerControl())
