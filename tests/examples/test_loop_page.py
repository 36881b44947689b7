"""docs/loop.md has hooks and events in the order in which real runs call them."""

from __future__ import annotations

import re
import textwrap

import pytest

from documented_order import documented_order
from pages import ROOT, blocks_of
from trainwright import Trainer, TrainerCallback
from trainwright.callbacks.base import EVENTS

(LOOP,) = (block.text for block in blocks_of(ROOT / "docs" / "loop.md") if block.language == "text")
NAMES = set(re.findall(r"<(\w+)>", LOOP))
RUNS = {
    "plain": {"max_steps": 3},
    "accumulation, with an uneven last update": {"gradient_accumulation_steps": 4, "num_train_epochs": 2},
    "evaluation on start": {"eval_on_start": True, "max_steps": 2},
    "everything by steps, and the best at the end": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "max_steps": 5,
        "load_best_model_at_end": True,
    },
    "everything by epochs": {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "num_train_epochs": 2,
    },
}


def hook(name, called):
    def call(self, *args, **kwargs):
        called.append(name)
        return getattr(Trainer, name)(self, *args, **kwargs)

    return call


def event(name, called):
    def call(self, args, state, control, **kwargs):
        called.append(name)

    return call


def recording(called):
    """A Trainer and a callback that record each hook and event of the page."""
    hooks = {name: hook(name, called) for name in NAMES - set(EVENTS) - {"compute_metrics"}}
    events = {name: event(name, called) for name in NAMES & set(EVENTS)}
    return type("Recording", (Trainer,), hooks), type("Recorder", (TrainerCallback,), events)


@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("with_metrics", [False, True])
def test_a_run_calls_hooks_and_events_in_the_order_of_the_page(make_trainer, arguments, with_metrics):
    called = []
    cls, recorder = recording(called)
    given = {"callbacks": [recorder()]}
    if with_metrics:
        given["compute_metrics"] = lambda prediction: called.append("compute_metrics") or {"zero": 0.0}
    trainer = make_trainer(trainer=given, cls=cls, preflight=False, **arguments)
    called.clear()
    trainer.train()
    order = documented_order("train", textwrap.indent(LOOP, "    "))
    assert order.fullmatch("".join(f"{name} " for name in called)), called


def test_every_event_of_a_training_is_on_the_page():
    assert set(EVENTS) - NAMES == {"on_init_end", "on_predict", "on_push_begin"}


def test_every_name_of_the_page_is_a_method_an_event_or_the_metrics():
    assert [name for name in NAMES if not (hasattr(Trainer, name) or name in EVENTS)] == ["compute_metrics"]
