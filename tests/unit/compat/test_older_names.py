"""Older names of arguments are translated once, at the door."""

import warnings

import pytest

from trainwright.compat.older_names import TRAIN, TRAINER, translated


def outer(older, rows, known):
    def inner():
        return translated(older, rows, "Trainer", known, stacklevel=3)

    return inner()


def test_older_names_are_translated_with_a_warning_that_points_at_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert outer({"tokenizer": 1, "callback": [2]}, TRAINER, []) == {"processing_class": 1, "callbacks": [2]}
    assert [str(w.message) for w in caught] == [
        "Trainer(tokenizer=...) is now called processing_class=.",
        "Trainer(callback=...) is now called callbacks=.",
    ]
    assert {w.category for w in caught} == {FutureWarning} and {w.filename for w in caught} == {__file__}


def test_nothing_older_is_nothing_to_say():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert translated({}, TRAIN, "train", []) == {}


@pytest.mark.parametrize(
    ("name", "suggested"), [("train_datasett", "train_dataset"), ("tokeniser", "tokenizer"), ("zebra", None)]
)
def test_an_unknown_name_is_a_type_error_with_the_nearest(name, suggested):
    with pytest.raises(TypeError, match=rf"Trainer\(\) got an unexpected argument '{name}'") as caught:
        translated({name: 1}, TRAINER, "Trainer", ["train_dataset"])
    assert (f"Did you mean {suggested!r}" in str(caught.value)) == (suggested is not None)


def test_the_warning_of_a_trainer_points_at_the_line_that_makes_it(make_trainer):
    from trainwright import Trainer

    model = make_trainer().model
    with pytest.warns(FutureWarning, match="processing_class") as caught:
        Trainer(model, tokenizer=None)
    assert caught[0].filename == __file__
