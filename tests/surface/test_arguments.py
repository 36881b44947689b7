"""Names and defaults of the arguments, compared with both documented generations (data/arguments.json)."""

import dataclasses
import json
from pathlib import Path

import pytest

from trainwright.args.renamed import RENAMED
from trainwright.args.seq2seq import Seq2SeqTrainingArguments
from trainwright.args.training import TrainingArguments

SURFACE = json.loads((Path(__file__).parent / "data" / "arguments.json").read_text())


def default_of(field):
    if field.default_factory is not dataclasses.MISSING:
        return {"factory": repr(field.default_factory())}
    return field.default


def defaults_of(cls):
    return {field.name: default_of(field) for field in dataclasses.fields(cls)}


def test_every_name_of_both_generations_and_nothing_unlisted_is_a_field():
    old, new = SURFACE["4.55"]["TrainingArguments"], SURFACE["5.23"]["TrainingArguments"]
    assert set(defaults_of(TrainingArguments)) == set(old) | set(new) | set(SURFACE["ours_only"])


def test_defaults_are_those_of_4_55():
    ours = defaults_of(TrainingArguments)
    expected = SURFACE["4.55"]["TrainingArguments"]
    assert {name: ours[name] for name in expected} == expected


def test_defaults_of_newer_names_are_those_of_5_23():
    ours, old = defaults_of(TrainingArguments), SURFACE["4.55"]["TrainingArguments"]
    expected = {name: value for name, value in SURFACE["5.23"]["TrainingArguments"].items() if name not in old}
    assert {name: ours[name] for name in expected} == expected


def test_the_defaults_that_differ_between_generations_are_exactly_the_listed_ones():
    ours, new = defaults_of(TrainingArguments), SURFACE["5.23"]["TrainingArguments"]
    differing = {name: value for name, value in new.items() if ours[name] != value}
    assert differing == SURFACE["defaults_that_differ_in_5.23"]


def test_generation_fields_and_defaults_agree():
    ours = defaults_of(Seq2SeqTrainingArguments)
    base = defaults_of(TrainingArguments)
    added = {name: value for name, value in ours.items() if name not in base}
    assert added == SURFACE["4.55"]["Seq2SeqTrainingArguments"] == SURFACE["5.23"]["Seq2SeqTrainingArguments"]


def test_an_older_name_is_gone_by_the_first_documented_generation_without_it():
    generations = ("4.55", "5.23")
    assert {name: row.gone_by for name, row in RENAMED.items()} == {
        name: next(each for each in generations if name not in SURFACE[each]["TrainingArguments"]) for name in RENAMED
    }


@pytest.mark.parametrize("generation", ["4.55", "5.23"])
def test_every_documented_method_and_property_exists(generation):
    missing = [name for name in SURFACE[generation]["methods"] if not hasattr(TrainingArguments, name)]
    assert missing == []


def test_every_argument_explains_itself():
    silent = [f.name for f in dataclasses.fields(Seq2SeqTrainingArguments) if len(f.metadata.get("help", "")) < 20]
    assert silent == []


def test_output_dir_is_the_first_argument():
    assert dataclasses.fields(TrainingArguments)[0].name == "output_dir"
