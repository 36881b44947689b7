"""`Seq2SeqTrainer` with `predict_with_generate` generates the same tokens as the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

PAD = 0
CALLS: dict[str, dict[str, Any]] = {
    "length": {"max_length": 9},
    "new tokens": {"max_new_tokens": 6},
    "beams": {"num_beams": 2, "max_length": 8},
}


def outputs_of(columns: Any, column: str, call: dict[str, Any], **arguments: Any) -> Any:
    trainer = columns.trainer(column, "t5", seq2seq=True, predict_with_generate=True, **arguments)
    return trainer.predict(columns.build_data("t5", 8), **call)


def assert_same_tokens(ours: Any, theirs: Any) -> None:
    """Equal, where the reference pads further than the generation was asked to go (see test_differences)."""
    width = ours.shape[1]
    np.testing.assert_array_equal(ours, theirs[:, :width])
    assert (np.isin(theirs[:, width:], [PAD, -100])).all()
    assert len({tuple(row) for row in ours.tolist()}) > 1


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_generated_tokens_are_the_same(columns: Any, call: dict[str, Any]) -> None:
    ours = outputs_of(columns, "ours", call, eval_loss_average="batches")
    theirs = outputs_of(columns, "reference", call)
    assert_same_tokens(ours.predictions, theirs.predictions)
    assert_same_tokens(ours.label_ids, theirs.label_ids)
    assert ours.metrics.keys() == theirs.metrics.keys() - {"test_model_preparation_time"}
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-6)


def test_the_arguments_set_length_and_beams_alike(columns: Any) -> None:
    arguments = {"generation_max_length": 7, "generation_num_beams": 3}
    ours, theirs = (outputs_of(columns, column, {}, **arguments) for column in ("ours", "reference"))
    assert_same_tokens(ours.predictions, theirs.predictions)
    assert ours.predictions.shape[1] == 7


def test_a_generation_config_is_followed_alike(columns: Any, reference: Any) -> None:
    config = reference.GenerationConfig(
        max_length=6, num_beams=2, pad_token_id=PAD, eos_token_id=1, decoder_start_token_id=0
    )
    ours, theirs = (outputs_of(columns, column, {}, generation_config=config) for column in ("ours", "reference"))
    np.testing.assert_array_equal(ours.predictions, theirs.predictions)


def test_a_sequence_to_sequence_model_trains_alike(columns: Any) -> None:
    ours, theirs = (columns.run(column, "t5", seq2seq=True) for column in ("ours", "reference"))
    columns.assert_same(ours, theirs, is_reference=True)
