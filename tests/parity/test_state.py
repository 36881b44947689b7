"""`trainer_state.json` and the log history hold what the reference's hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

TIMES = ("runtime", "per_second")
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "best": {
        "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "save_total_limit": 2,
        "metric_for_best_model": "eval_loss", "greater_is_better": False,
    },
    "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 2.0},
    "tokens": {"include_num_input_tokens_seen": True},
}  # fmt: skip


def assert_same_value(key: str, ours: Any, theirs: Any, tolerance: float) -> None:
    if key.endswith(TIMES):
        return
    if isinstance(ours, float) or isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=tolerance, rel=1e-6), key
    elif isinstance(ours, str) and "checkpoint-" in ours:
        assert ours.split("checkpoint-")[1] == theirs.split("checkpoint-")[1]
    else:
        assert ours == theirs, key


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_state_of_every_checkpoint_is_the_same(columns: Any, kind: str, row: dict[str, Any]) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "dropout": 0.0, **row}
    ours = columns.run("ours", kind, eval_loss_average="batches", **options)
    theirs = columns.run("reference", kind, **options)
    names = [sorted(p.name for p in (columns.directory / c).glob("checkpoint-*")) for c in ("ours", "reference")]
    assert names[0] == names[1] and names[0]
    for name in names[0]:
        left, right = (
            json.loads((columns.directory / column / name / "trainer_state.json").read_text())
            for column in ("ours", "reference")
        )
        assert left.keys() == right.keys()
        our_history, their_history = left.pop("log_history"), right.pop("log_history")
        assert len(our_history) == len(their_history)
        for one, other in zip(our_history, their_history):
            assert one.keys() == other.keys()
            for key in one:
                assert_same_value(key, one[key], other[key], columns.loss_tolerance)
        for key in left:
            assert_same_value(key, left[key], right[key], columns.loss_tolerance)
    # The last line, written after the last checkpoint, and what train() returns.
    assert ours.trainer.state.log_history[-1].keys() == theirs.trainer.state.log_history[-1].keys()
    assert ours.output.metrics.keys() - {"total_flos"} == theirs.output.metrics.keys()  # see test_differences
    assert ours.output.training_loss == pytest.approx(theirs.output.training_loss, abs=1e-6)


def test_files_of_a_checkpoint_are_the_documented_ones(columns: Any) -> None:
    for column in ("ours", "reference"):
        columns.run(column, "bert", save_strategy="steps", save_steps=4)
    ours, theirs = ({p.name for p in (columns.directory / c / "checkpoint-8").iterdir()} for c in ("ours", "reference"))
    assert theirs <= ours
