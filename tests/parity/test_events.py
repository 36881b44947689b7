"""Callbacks receive the same events, at the same steps, as from the reference."""

from __future__ import annotations

from typing import Any

import pytest

from trainwright.callbacks.base import EVENTS

ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "evaluate and save by steps": {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4, "num_train_epochs": 2.0,
    },
    "by epochs": {
        "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch", "num_train_epochs": 2.0,
    },
    "first step, sparse": {
        "logging_first_step": True, "logging_steps": 3, "eval_on_start": True, "eval_strategy": "epoch",
    },
    "stopped by max_steps": {"max_steps": 9, "logging_steps": 4},
    "nothing": {"logging_strategy": "no", "num_train_epochs": 1.0},
    "best": {
        "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best", "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
    },
}  # fmt: skip


def recorded(columns: Any, column: str, library: Any, **options: Any) -> list[tuple[str, int]]:
    """(event, global step) in the order of their calls, of a training and a prediction."""
    events: list[tuple[str, int]] = []

    def recorder(event: str) -> Any:
        return lambda self, args, state, control, **kwargs: events.append((event, state.global_step))

    callback = type("Recorder", (library.TrainerCallback,), {event: recorder(event) for event in EVENTS})
    trainer = columns.trainer(column, "regression", given={"callbacks": [callback]}, **options)
    trainer.train()
    trainer.predict(columns.build_data("regression", 5))
    return events


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_events_come_in_the_same_order(columns: Any, reference: Any, row: dict[str, Any]) -> None:
    import trainwright

    ours = recorded(columns, "ours", trainwright, dropout=0.0, **row)
    theirs = recorded(columns, "reference", reference, dropout=0.0, **row)
    assert ours == theirs
