"""Older names of arguments are translated once; arguments of another implementation of the same names become ours."""

import warnings
from dataclasses import dataclass, field
from enum import Enum

import pytest

from trainwright import Seq2SeqTrainingArguments, TrainingArguments
from trainwright.compat.older_arguments import TRAIN, TRAINER, adopted, translated


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


class Strategy(Enum):
    STEPS = "steps"


@dataclass
class Foreign:
    output_dir: str = "out"
    per_device_train_batch_size: int = 3
    eval_strategy: Strategy = Strategy.STEPS
    eval_steps: int = 7
    learning_rate: float = 0.5
    temperature: float = 0.25
    report_to: list = field(default_factory=list)
    fsdp: list = field(default_factory=list)
    fsdp_config: dict = field(default_factory=lambda: {"min_num_params": 0})


@dataclass
class ForeignSeq2Seq(Foreign):
    predict_with_generate: bool = True


def test_values_come_over_with_enums_by_value_and_added_fields_as_attributes():
    args = adopted(Foreign())
    assert type(args) is TrainingArguments
    assert (args.output_dir, args.train_batch_size, args.eval_steps, args.learning_rate) == ("out", 3, 7, 0.5)
    assert args.eval_strategy == "steps" and args.temperature == 0.25 and args.report_to == []
    assert args.nonfinite == "raise"  # what they do not know has its default


@dataclass
class ForeignNamesakes(Foreign):
    """As TRL's, whose trainers pack the data themselves."""

    packing: bool = True
    ema_decay: float = 2.0  # no value that ours would accept
    async_save: bool = False


def test_a_namesake_of_an_argument_that_only_we_have_is_not_taken_for_it(caplog):
    args = adopted(ForeignNamesakes())
    assert (args.packing, args.packs, args.ema_decay, args.async_save) == (False, False, None, False)
    assert args.learning_rate == 0.5
    (record,) = caplog.records
    assert (
        "packing=True, ema_decay=2.0 of " in record.message and "ForeignNamesakes was not converted" in record.message
    )


def test_without_namesakes_nothing_is_said(caplog):
    adopted(ForeignNamesakes(packing=False, ema_decay=None))
    adopted(Foreign())
    assert caplog.records == []


def test_arguments_for_generation_become_those_for_generation():
    args = adopted(ForeignSeq2Seq())
    assert type(args) is Seq2SeqTrainingArguments and args.predict_with_generate


def test_ours_and_what_is_no_arguments_at_all_stay_as_they_are():
    ours, nothing = TrainingArguments("out"), object()
    assert adopted(ours) is ours and adopted(nothing) is nothing


def test_a_value_that_cannot_be_taken_over_is_named_with_the_cure():
    with pytest.raises(TypeError, match=r"Foreign, and it cannot be converted: .*learning_rate.*dropin"):
        adopted(Foreign(learning_rate=-1.0))
