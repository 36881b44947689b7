"""The events of real runs, compared with the loop that `callbacks/base.py` documents."""

import itertools

import pytest

from documented_order import documented_order
from trainwright import EarlyStoppingCallback, TrainerCallback
from trainwright.callbacks.base import EVENTS


class Recorder(TrainerCallback):
    """Records the name of every event, the update at which it happened, and the keywords it came with."""

    def __init__(self):
        self.events, self.steps, self.keywords = [], [], []

    def at(self, event):
        return [step for name, step in zip(self.events, self.steps) if name == event]


def recording(event):
    def record(self, args, state, control, **kwargs):
        self.events.append(event)
        self.steps.append(state.global_step)
        self.keywords.append(kwargs)

    return record


for event in EVENTS:
    setattr(Recorder, event, recording(event))


def matches(heading, events):
    return documented_order(heading).fullmatch("".join(f"{event} " for event in events)) is not None


def recorded(make_trainer, **arguments):
    """A trainer whose recorder has forgotten the construction, and that recorder."""
    recorder = Recorder()
    trainer = make_trainer(trainer={"callbacks": [recorder]}, **arguments)
    recorder.events.clear(), recorder.steps.clear(), recorder.keywords.clear()
    return trainer, recorder


RUNS = {
    "plain": {},
    "accumulation with an uneven last update": {"gradient_accumulation_steps": 4, "num_train_epochs": 2},
    "evaluation on start": {"eval_on_start": True, "max_steps": 2},
    "evaluation and checkpoints by steps": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        "max_steps": 7,
    },
    "everything by epochs": {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "num_train_epochs": 2,
    },
    "no log, evaluation or checkpoint": {"logging_strategy": "no", "max_steps": 3},
    "stopped in the middle of an epoch": {"max_steps": 8},
}


@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS.keys())
def test_the_events_of_a_run_come_in_the_documented_order(make_trainer, arguments):
    trainer, recorder = recorded(make_trainer, **arguments)
    trainer.train()
    assert matches("train", recorder.events), recorder.events
    assert recorder.at("on_step_end") == list(range(1, trainer.state.max_steps + 1))


def test_construction_ends_with_one_event(make_trainer):
    recorder = Recorder()
    make_trainer(trainer={"callbacks": [recorder]})
    assert matches("init", recorder.events) and recorder.events == ["on_init_end"]


def test_an_evaluation_fires_one_event_per_batch_then_logs(make_trainer):
    trainer, recorder = recorded(make_trainer, per_device_eval_batch_size=4)
    trainer.evaluate()
    assert matches("evaluate", recorder.events)
    assert recorder.events.count("on_prediction_step") == 3  # 9 samples in batches of 4


def test_each_of_several_evaluation_sets_is_logged_by_itself(make_trainer, line_data):
    trainer, recorder = recorded(make_trainer)
    trainer.evaluate({"a": line_data(3), "b": line_data(5)})
    assert matches("evaluate", recorder.events)
    assert recorder.events.count("on_evaluate") == 2


def test_a_prediction_ends_with_its_own_event(make_trainer, line_data):
    trainer, recorder = recorded(make_trainer)
    trainer.predict(line_data(5))
    assert matches("predict", recorder.events) and recorder.events[-1] == "on_predict"


def test_micro_batches_but_the_last_end_a_substep_also_in_the_short_update(make_trainer):
    trainer, recorder = recorded(make_trainer, gradient_accumulation_steps=4, num_train_epochs=1)
    trainer.train()
    # 6 micro-batches: an update of 4 and one of 2
    assert [(name, len(list(group))) for name, group in itertools.groupby(recorder.events) if "substep" in name] == [
        ("on_substep_end", 3),
        ("on_substep_end", 1),
    ]


def test_logs_evaluations_and_checkpoints_happen_at_their_intervals(make_trainer):
    trainer, recorder = recorded(
        make_trainer,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=4,
        max_steps=7,
    )
    trainer.train()
    assert recorder.at("on_evaluate") == [3, 6, 7]
    assert recorder.at("on_save") == [4, 7]
    assert recorder.at("on_log") == [2, 3, 4, 6, 6, 7, 7]  # training lines, evaluations, and the last line


def test_an_epoch_strategy_acts_after_the_epoch_end(make_trainer):
    trainer, recorder = recorded(
        make_trainer, logging_strategy="epoch", eval_strategy="epoch", save_strategy="epoch", num_train_epochs=1
    )
    trainer.train()
    after = recorder.events[recorder.events.index("on_epoch_end") + 1 :]
    kept = [event for event in after if event != "on_prediction_step"]
    assert kept == ["on_log", "on_log", "on_evaluate", "on_save", "on_log", "on_train_end"]


def test_every_event_of_training_sees_the_parts_of_the_run(make_trainer):
    processor = object()
    recorder = Recorder()
    trainer = make_trainer(
        trainer={"callbacks": [recorder], "processing_class": processor},
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
    )
    trainer.train()
    seen = [kw for event, kw in zip(recorder.events, recorder.keywords) if event != "on_init_end"]
    assert seen
    for keywords in seen:
        assert keywords["model"] is trainer.model
        assert keywords["optimizer"] is trainer.optimizer
        assert keywords["lr_scheduler"] is trainer.lr_scheduler
        assert keywords["processing_class"] is keywords["tokenizer"] is processor
        assert len(keywords["train_dataloader"]) == 6
    assert seen[-1]["eval_dataloader"] is not None


def test_metrics_and_logs_reach_the_events_that_own_them(make_trainer, line_data):
    trainer, recorder = recorded(make_trainer, max_steps=1)
    trainer.train()
    trainer.evaluate()
    trainer.predict(line_data(3))
    by_event = dict(zip(recorder.events, recorder.keywords))
    assert "eval_loss" in by_event["on_evaluate"]["metrics"]
    assert "test_loss" in by_event["on_predict"]["metrics"]
    assert "eval_loss" in by_event["on_log"]["logs"]


class Ask(TrainerCallback):
    """Sets fields of control at one update, in place or by returning a dict."""

    def __init__(self, step, by_dict, event="on_step_end", **fields):
        self.step, self.by_dict, self.fields = step, by_dict, fields
        setattr(self, event, self.answer)

    def answer(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return None
        if self.by_dict:
            return self.fields
        for name, value in self.fields.items():
            setattr(control, name, value)
        return control


@pytest.mark.parametrize("by_dict", [False, True], ids=["in place", "as a dict"])
class TestControl:
    def run(self, make_trainer, ask, **arguments):
        recorder = Recorder()
        arguments = {"logging_strategy": "no", "max_steps": 8, **arguments}
        trainer = make_trainer(trainer={"callbacks": [ask, recorder]}, **arguments)
        trainer.train()
        assert matches("train", recorder.events[1:])
        return trainer, recorder

    def test_training_stops_after_the_step_that_asks_for_it(self, make_trainer, by_dict):
        trainer, recorder = self.run(make_trainer, Ask(3, by_dict, should_training_stop=True))
        assert trainer.state.global_step == 3
        assert recorder.events[-1] == "on_train_end"

    def test_an_epoch_stops_and_the_next_one_goes_on(self, make_trainer, by_dict):
        trainer, recorder = self.run(
            make_trainer, Ask(2, by_dict, should_epoch_stop=True), max_steps=-1, num_train_epochs=2
        )
        assert recorder.at("on_epoch_begin") == [0, 2]
        assert trainer.state.global_step == 2 + 6
        assert trainer.state.epoch == 2

    @pytest.mark.parametrize(
        "field, event", [("should_save", "on_save"), ("should_evaluate", "on_evaluate"), ("should_log", "on_log")]
    )
    def test_what_a_step_asks_for_is_done_once(self, make_trainer, by_dict, field, event):
        _, recorder = self.run(make_trainer, Ask(3, by_dict, **{field: True}))
        num_last_lines = {"on_log": 1}.get(event, 0)  # every run ends with a log line
        assert recorder.at(event) == [3] + [8] * num_last_lines

    def test_what_the_end_of_an_epoch_asks_for_is_done(self, make_trainer, by_dict):
        ask = Ask(6, by_dict, event="on_epoch_end", should_evaluate=True, should_save=True)
        _, recorder = self.run(make_trainer, ask)
        assert recorder.at("on_evaluate") == recorder.at("on_save") == [6]


def test_a_flag_set_before_the_step_is_reset_by_it(make_trainer):
    recorder = Recorder()
    ask = Ask(0, False, event="on_epoch_begin", should_save=True)
    make_trainer(trainer={"callbacks": [ask, recorder]}, max_steps=2).train()
    assert recorder.at("on_save") == []


def test_training_again_starts_although_the_last_run_was_stopped(make_trainer):
    trainer = make_trainer(trainer={"callbacks": [Ask(2, False, should_training_stop=True)]}, max_steps=5)
    assert trainer.train().global_step == 2
    trainer.pop_callback(Ask)
    assert trainer.train().global_step == 5


def test_early_stopping_ends_a_run_that_no_longer_improves(make_trainer):
    trainer = make_trainer(
        trainer={"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
        learning_rate=0.0,  # nothing ever improves after the first evaluation
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        max_steps=10,
    )
    assert trainer.train().global_step == 3


def test_an_unknown_field_in_a_returned_dict_is_named(make_trainer):
    trainer = make_trainer(trainer={"callbacks": [Ask(1, True, should_stop=True)]}, max_steps=2)
    with pytest.raises(ValueError, match=r"Ask.*should_stop.*should_training_stop"):
        trainer.train()


def test_callbacks_are_added_and_removed_by_class_or_instance(make_trainer):
    trainer = make_trainer()
    recorder = Recorder()
    trainer.add_callback(recorder)
    assert trainer.pop_callback(Recorder) is recorder
    trainer.add_callback(Recorder)
    trainer.remove_callback(Recorder)
    assert trainer.pop_callback(Recorder) is None


def test_the_epoch_is_a_number_at_every_event_of_a_run(make_trainer):
    seen = []

    class Reader(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(state.epoch)

        on_epoch_begin = on_step_begin = on_step_end = on_train_begin

    make_trainer(trainer={"callbacks": [Reader()]}, max_steps=2).train()
    assert seen[:3] == [0, 0, 0] and all(isinstance(epoch, float) for epoch in seen)
    assert seen == sorted(seen) and seen[-1] > 0
