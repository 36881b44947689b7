import pytest
import torch

from trainwright.evaluation.gathering import predict_without_repeats


def predict(inputs):
    x = inputs["x"]
    return x.mean(), (x * 2, {"odd": torch.ones(3)}), inputs["labels"]


INPUTS = {"x": torch.arange(4.0), "labels": torch.tensor([[0], [1], [2], [3]])}


def test_the_loss_is_that_of_the_own_rows_and_all_rows_keep_their_place():
    loss, (doubled, other), labels = predict_without_repeats(INPUTS, predict, lambda rows: 2)
    assert loss == 0.5
    assert doubled.tolist() == [0, 2, 2, 2] and labels.tolist() == [[0], [1], [1], [1]]
    assert len(other["odd"]) == 3  # not one row per sample


@pytest.mark.parametrize("own", [0, 4])
def test_a_batch_that_is_all_own_or_not_at_all_is_predicted_as_it_is(own):
    loss, (doubled, _), _ = predict_without_repeats(INPUTS, predict, lambda rows: own)
    assert loss == 1.5 and doubled.tolist() == [0, 2, 4, 6]


def test_an_entry_of_each_sample_takes_the_place_of_rows():
    boxes = [{"boxes": torch.ones(size, 4) * size} for size in (1, 2, 3, 4)]

    def detect(inputs):
        return inputs["x"].mean(), {"found": inputs["labels"]}, inputs["labels"]

    loss, outputs, labels = predict_without_repeats({"x": INPUTS["x"], "labels": boxes}, detect, lambda rows: 2)
    assert loss == 0.5
    for entries in (outputs["found"], labels):
        assert [len(entry["boxes"]) for entry in entries] == [1, 2, 2, 2]


def test_a_batch_whose_rows_cannot_be_told_apart_is_predicted_as_it_is():
    packed = {**INPUTS, "bounds": torch.arange(5)}
    loss, _, _ = predict_without_repeats(packed, predict, lambda rows: 1 / 0)
    assert loss == 1.5
