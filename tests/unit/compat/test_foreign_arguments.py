"""Arguments of another implementation of the same names become ours."""

from dataclasses import dataclass, field
from enum import Enum

import pytest

from trainwright import Seq2SeqTrainingArguments, TrainingArguments
from trainwright.compat.foreign_arguments import adopted


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
        "packing=True, ema_decay=2.0 of " in record.message and "ForeignNamesakes was not taken over" in record.message
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
    with pytest.raises(TypeError, match=r"Foreign, and it cannot be taken over: .*learning_rate.*dropin"):
        adopted(Foreign(learning_rate=-1.0))
