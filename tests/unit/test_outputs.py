"""The tuples that public methods return."""

import numpy as np
import pytest

from trainwright.outputs import BestRun, EvalLoopOutput, EvalPrediction, PredictionOutput, TrainOutput

ROWS, LABELS, INPUTS, LOSSES = np.zeros((2, 3)), np.ones(2), np.arange(2), np.array([0.5, 0.6])


def test_the_tuples_have_the_documented_fields():
    assert TrainOutput._fields == ("global_step", "training_loss", "metrics")
    assert EvalLoopOutput._fields == ("predictions", "label_ids", "metrics", "num_samples")
    assert PredictionOutput._fields == ("predictions", "label_ids", "metrics")
    assert BestRun._fields == ("run_id", "objective", "hyperparameters", "run_summary")
    assert BestRun("0", 0.1, {}).run_summary is None


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, (ROWS, LABELS)),
        ({"inputs": INPUTS}, (ROWS, LABELS, INPUTS)),
        ({"losses": LOSSES}, (ROWS, LABELS, LOSSES)),
        ({"inputs": INPUTS, "losses": LOSSES}, (ROWS, LABELS, INPUTS, LOSSES)),
    ],
)
def test_a_prediction_unpacks_and_indexes_by_what_was_asked_for(extra, expected):
    prediction = EvalPrediction(predictions=ROWS, label_ids=LABELS, **extra)
    assert all(a is b for a, b in zip(prediction, expected)) and len(list(prediction)) == len(expected)
    for place, value in enumerate(expected):
        assert prediction[place] is value and prediction[place - len(expected)] is value
    assert prediction.predictions is ROWS and prediction.label_ids is LABELS
    assert prediction.inputs is extra.get("inputs") and prediction.losses is extra.get("losses")


@pytest.mark.parametrize("index", [2, -3])
def test_an_index_beyond_the_elements_names_the_argument_that_adds_some(index):
    with pytest.raises(IndexError, match=rf"2 elements, so there is no index {index}.*include_for_metrics"):
        EvalPrediction(ROWS, LABELS)[index]
