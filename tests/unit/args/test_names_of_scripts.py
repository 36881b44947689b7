"""Arguments that no documented implementation has leave their names to scripts that use them for something else."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from trainwright import HfArgumentParser, TrainingArguments

SURFACE = json.loads((Path(__file__).parents[2] / "surface" / "data" / "arguments.json").read_text())


@dataclass
class OfAScript:
    packing: str = field(default="none", metadata={"help": "Of the script."})
    ema_decay: float = field(default=2.0)


def test_exactly_our_own_arguments_are_marked():
    marked = {one.name for one in fields(TrainingArguments) if one.metadata.get("extension")}
    assert marked == set(SURFACE["ours_only"])


@pytest.mark.parametrize("order", [(OfAScript, TrainingArguments), (TrainingArguments, OfAScript)])
def test_a_name_that_a_script_uses_too_is_the_scripts(order):
    parser = HfArgumentParser(order)
    parsed = parser.parse_args_into_dataclasses(["--output_dir", "out", "--packing", "tight", "--ema_decay", "3"])
    script, args = (next(one for one in parsed if type(one) is kind) for kind in (OfAScript, TrainingArguments))
    assert (script.packing, script.ema_decay) == ("tight", 3.0)
    assert (args.packing, args.ema_decay, args.output_dir) == (False, None, "out")
    script, args = HfArgumentParser([OfAScript, TrainingArguments]).parse_dict({"output_dir": "o", "packing": "x"})
    assert (script.packing, args.packing) == ("x", False)


def test_without_such_a_script_they_are_on_the_command_line():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--packing", "--ema_decay", "0.5"])
    assert (args.packing, args.packs, args.ema_decay) == (True, True, 0.5)


def test_the_packing_of_trl_is_left_to_its_trainers(monkeypatch):
    @dataclass
    class Config(TrainingArguments):
        packing: bool = False
        packing_strategy: str = "bfd"

    class Derived(Config):
        """Of a user."""

    options = {"report_to": "none", "packing": True, "group_by_length": True}
    with pytest.raises(ValueError, match="packing=True makes all sequences equally long"):
        Config("out", **options)
    monkeypatch.setattr(Config, "__module__", "trl.trainer.sft_config")
    for kind in (Config, Derived):
        args = kind("out", **options)
        assert args.packing and not args.packs
