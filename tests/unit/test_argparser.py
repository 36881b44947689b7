"""HfArgumentParser: flags, files, files overridden by flags, errors."""

import json
import subprocess
import sys
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, MutableSequence, Sequence, Sized
from collections.abc import Set as AbstractSet
from dataclasses import KW_ONLY, InitVar, dataclass, field, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, NewType

import pytest
import yaml

from trainwright.argparser import HfArg, HfArgumentParser
from trainwright.args.training import TrainingArguments


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Size(str, Enum):
    SMALL = "small"
    LARGE = "large"


@dataclass
class Everything:
    """What a data script might take."""

    number: int = 3
    rate: float = 0.1
    name: str = "a"
    maybe: float | None = None
    title: str | None = None
    flag: bool = False
    on: bool = True
    unsure: bool | None = None
    colour: Colour = Colour.RED
    size: Size = Size.SMALL
    mode: Literal["fast", 2] = "fast"
    names: list[str] = field(default_factory=lambda: ["x"])
    counts: list[int] | None = None
    split: "int | str" = "all"
    where: Path = Path("here")
    settings: dict | None = None
    pair: tuple[int, float] = (1, 2.0)
    anything: Any = None
    hidden: int = field(default=5, init=False)


@dataclass
class Needed:
    path: str = field(metadata={"help": "where"})
    other: int = 1


@dataclass
class DataTrainingArguments:
    lang: str = field(default=None, metadata={"help": "xxx"})
    dataset_name: str | None = field(default=None, metadata={"help": "yyy"})


@dataclass
class ModelArguments:
    path: str = field(metadata={"help": "zzz"})


def parse(*words, types=Everything, **kwargs):
    return HfArgumentParser(types).parse_args_into_dataclasses(list(words), look_for_args_file=False, **kwargs)


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--number", "7"], "number", 7),
        (["--number", "1e3"], "number", 1000),
        (["--number", "-1"], "number", -1),
        (["--rate", "1e-4"], "rate", 1e-4),
        (["--name", "None"], "name", "None"),
        (["--maybe", "2"], "maybe", 2.0),
        (["--maybe", "none"], "maybe", None),
        (["--title", "null"], "title", "null"),
        (["--title", "None"], "title", None),
        (["--flag"], "flag", True),
        (["--flag", "False"], "flag", False),
        (["--flag", "yes"], "flag", True),
        (["--on", "0"], "on", False),
        (["--no_on"], "on", False),
        (["--no-on"], "on", False),
        ([], "on", True),
        (["--unsure"], "unsure", True),
        (["--unsure", "None"], "unsure", None),
        (["--colour", "blue"], "colour", Colour.BLUE),
        ([], "colour", Colour.RED),
        (["--size", "large"], "size", Size.LARGE),
        (["--mode", "2"], "mode", 2),
        (["--names", "a", "b"], "names", ["a", "b"]),
        (["--names", "['a', 'b']"], "names", ["a", "b"]),
        ([], "names", ["x"]),
        (["--counts", "1", "2"], "counts", [1, 2]),
        (["--counts", "[1, 2]"], "counts", [1, 2]),
        (["--split", "5"], "split", 5),
        (["--split", "half"], "split", "half"),
        (["--where", "a/b"], "where", Path("a/b")),
        (["--settings", '{"a": 1}'], "settings", {"a": 1}),
        (["--settings", "{'a': None}"], "settings", {"a": None}),
        (
            ["--settings.a.b", "1e-5", "--settings.a.c=text", "--settings.on"],
            "settings",
            {"a": {"b": 1e-5, "c": "text"}, "on": True},
        ),
        (["--settings", '{"a": 1}', "--settings.b", "true"], "settings", {"a": 1, "b": True}),
        (["--settings.a", "-1", "--settings.b", "-2.5e-3"], "settings", {"a": -1, "b": -2.5e-3}),
        (["--pair", "3", "4"], "pair", (3, 4.0)),
        (["--anything", "[1]"], "anything", [1]),
        (["--anything", "word"], "anything", "word"),
    ],
)
def test_a_flag_becomes_a_typed_value(words, name, expected):
    (found,) = parse(*words)
    value = getattr(found, name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--number", "half"], "'half' is not a whole number"),
        (["--number", "1.5"], "'1.5' is not a whole number"),
        (["--rate", "fast"], "'fast' is not a number"),
        (["--flag", "perhaps"], "neither true nor false"),
        (["--colour", "green"], "['red', 'blue']"),
        (["--mode", "slow"], "['fast', 2]"),
        (["--settings", "{broken"], "JSON"),
        (["--counts", "1", "b"], "'b' is not a whole number"),
        (["--name", "a", "--settings.a.b", "1", "--settings.a", "2", "--settings.a.b", "1"], "is no dict"),
    ],
)
def test_a_wrong_value_ends_with_a_message(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        parse(*words)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_plain_enum_without_a_member_as_default_is_handed_over_by_value():
    @dataclass
    class Raw:
        colour: Colour = "red"

    globals()["Raw"] = Raw
    assert parse("--colour", "blue", types=Raw)[0].colour == "blue"


def test_underscores_and_dashes_are_the_same():
    args = parse("--output-dir", "o", "--learning-rate", "1", "--report_to", "none", types=TrainingArguments)[0]
    assert args.output_dir == "o" and args.learning_rate == 1.0


def test_aliases_work_and_HfArg_writes_a_field():
    @dataclass
    class Short:
        rate: float = HfArg(default=1.0, aliases=["--lr", "-r"], help="speed")
        words: list = HfArg(default_factory=list, aliases="-w")  # noqa: RUF009

    assert parse("--lr", "2", "-w", "a", "b", types=Short)[0] == Short(2.0, ["a", "b"])
    assert parse("-r", "3", types=Short)[0] == Short(3.0, [])


def test_metadata_choices_are_kept(capsys):
    @dataclass
    class Choice:
        size: int = field(default=1, metadata={"choices": [1, 2]})

    assert parse("--size", "2", types=Choice)[0].size == 2
    with pytest.raises(SystemExit):
        parse("--size", "3", types=Choice)


def test_several_dataclasses_come_back_in_order_then_your_own_arguments():
    parser = HfArgumentParser((Everything, Needed))
    parser.add_argument("--mine", type=int, default=0)
    first, second, rest = parser.parse_args_into_dataclasses(["--path", "p", "--number", "9", "--mine", "4"])
    assert (first.number, second.path, rest.mine) == (9, "p", 4)


def test_a_required_field_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        parse(types=Needed)
    assert "--path" in capsys.readouterr().err


def test_an_unknown_flag_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"not used by the HfArgumentParser: \['--nmber'\] Did you mean '--number'"):
        parse("--nmber", "3")


def test_unknown_words_are_returned_on_request():
    assert parse("--else", "3", return_remaining_strings=True)[1] == ["--else", "3"]


@pytest.mark.parametrize("wrong", [Needed("p"), "text", [3], int])
def test_what_is_no_dataclass_is_refused(wrong):
    with pytest.raises(TypeError, match="dataclass"):
        HfArgumentParser(wrong)


def test_without_dataclasses_it_is_an_argparse_parser():
    parser = HfArgumentParser()
    parser.add_argument("--a")
    assert parser.parse_args(["--a", "1"]).a == "1"


def test_parsing_plainly_gives_defaults_and_types():
    namespace = HfArgumentParser(Everything).parse_args(["--rate", "2"])
    assert (namespace.rate, namespace.number, namespace.names) == (2.0, 3, ["x"])


def test_defaults_set_on_the_parser_are_used():
    parser = HfArgumentParser(Everything)
    parser.set_defaults(number=8)
    assert parser.parse_args_into_dataclasses([])[0].number == 8


# Every kind of annotation: the declared type, or an error that names the field.


@dataclass
class Inner:
    size: int = 1
    names: list[str] = field(default_factory=list)


Count = NewType("Count", int)


@dataclass
class Kinds:
    a_set: set[str] = field(default_factory=set)
    frozen: frozenset[int] = frozenset()
    sequence: Sequence[str] = ()
    mutable: MutableSequence[int] = field(default_factory=list)
    iterable: Iterable[str] = ()
    collection: Collection[int] = ()
    abstract_set: AbstractSet[str] = frozenset()
    queue: deque[int] = field(default_factory=deque)
    maybe_set: set[int] | None = None
    maybe_sequence: "Sequence[float] | None" = None
    several: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    colours: list[Colour] = field(default_factory=list)
    modes: list[Literal["fast", 2]] = field(default_factory=list)
    maybe_modes: list[Literal["fast", "slow"]] | None = None
    numbers: dict[str, int] = field(default_factory=dict)
    mapping: Mapping[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    maybe_inner: Inner | None = None
    inners: list[Inner] = field(default_factory=list)
    switch_or_text: bool | str = False
    maybe_switch_or_text: bool | str | None = None
    text_or_list: str | list[str] = "one"
    annotated: Annotated[int, "in seconds"] = 1
    renamed: Count = Count(1)
    final: Final[int] = 1
    maybe_path: Path | None = None
    number: complex = 0j
    called: Callable[[int], int] = abs
    in_all: ClassVar[int] = 7
    _: KW_ONLY
    last: int = 3
    only_passed: InitVar[int] = 0

    def __post_init__(self, only_passed: int) -> None:
        self.passed = only_passed


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--a_set", "a", "b", "a"], "a_set", {"a", "b"}),
        (["--a_set", "{'a', 'b'}"], "a_set", {"a", "b"}),
        (["--a_set", "['a', 'b']"], "a_set", {"a", "b"}),
        (["--frozen", "1", "2"], "frozen", frozenset({1, 2})),
        (["--sequence", "a", "b"], "sequence", ["a", "b"]),
        (["--sequence", "a"], "sequence", ["a"]),
        (["--mutable", "1"], "mutable", [1]),
        (["--iterable", "a", "b"], "iterable", ["a", "b"]),
        (["--collection", "1", "2"], "collection", [1, 2]),
        (["--abstract_set", "a"], "abstract_set", {"a"}),
        (["--queue", "1", "2"], "queue", deque([1, 2])),
        (["--maybe_set", "1", "1"], "maybe_set", {1}),
        (["--maybe_set", "None"], "maybe_set", None),
        (["--maybe_sequence", "1", "2.5"], "maybe_sequence", [1.0, 2.5]),
        (["--several", "1", "2", "3"], "several", (1, 2, 3)),
        (["--pair", "2", "b"], "pair", (2, "b")),
        (["--colours", "red", "blue"], "colours", [Colour.RED, Colour.BLUE]),
        (["--modes", "2", "fast"], "modes", [2, "fast"]),
        (["--maybe_modes", "slow"], "maybe_modes", ["slow"]),
        (["--numbers", '{"a": "1"}'], "numbers", {"a": 1}),
        (["--numbers.a", "1e3"], "numbers", {"a": 1000}),
        (["--mapping", '{"a": 1}'], "mapping", {"a": 1.0}),
        (["--inner", '{"size": "3", "names": ["a"]}'], "inner", Inner(3, ["a"])),
        (["--inner.size", "4"], "inner", Inner(4)),
        (["--maybe_inner", '{"size": 2}'], "maybe_inner", Inner(2)),
        (["--maybe_inner.size", "2"], "maybe_inner", Inner(2)),
        (["--inners", '[{"size": 1}, {"size": 2}]'], "inners", [Inner(1), Inner(2)]),
        (["--switch_or_text"], "switch_or_text", True),
        (["--switch_or_text", "false"], "switch_or_text", False),
        (["--switch_or_text", "maybe"], "switch_or_text", "maybe"),
        (["--maybe_switch_or_text"], "maybe_switch_or_text", True),
        (["--maybe_switch_or_text", "None"], "maybe_switch_or_text", None),
        (["--text_or_list", "a"], "text_or_list", "a"),
        (["--text_or_list", "a", "b"], "text_or_list", ["a", "b"]),
        (["--annotated", "2"], "annotated", 2),
        (["--renamed", "2"], "renamed", 2),
        (["--final", "2"], "final", 2),
        (["--maybe_path", "a/b"], "maybe_path", Path("a/b")),
        (["--number", "1+2j"], "number", 1 + 2j),
        ([], "called", abs),
        (["--last", "5"], "last", 5),
        (["--only_passed", "5"], "passed", 5),
    ],
)
def test_a_flag_becomes_the_declared_type(words, name, expected):
    (found,) = parse(*words, types=Kinds)
    value = getattr(found, name)
    assert value == expected and type(value) is type(expected)
    if isinstance(value, (list, set, tuple)):
        assert sorted(map(type, value), key=str) == sorted(map(type, expected), key=str)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frozen", "1", "b"], "'b' is not a whole number"),
        (["--pair", "1"], "not the 2 of tuple[int, str]"),
        (["--colours", "green"], "['red', 'blue']"),
        (["--maybe_modes", "fast", "slowly"], "['fast', 'slow']"),
        (["--numbers.a", "many"], "'many' is not a whole number"),
        (["--inner", '{"sise": 3}'], "Inner has no field 'sise'; it has size, names"),
        (["--inner.size", "big"], "'big' is not a whole number"),
        (["--called", "abs"], "cannot become"),
        (["--in_all", "1"], "--in_all"),
    ],
)
def test_a_word_that_is_not_of_the_declared_type_ends_with_a_message(words, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as left:
        parse(*words, types=Kinds)
    assert message in (str(left.value) + capsys.readouterr().err)


def test_nested_dataclasses_and_sets_are_read_from_a_dict():
    given = {"inner": {"size": "2"}, "a_set": ["a"], "maybe_inner": None, "sequence": ["a"], "numbers": {"a": "3"}}
    (found,) = HfArgumentParser(Kinds).parse_dict(given)
    assert (found.inner, found.a_set, found.maybe_inner) == (Inner(2), {"a"}, None)
    assert (found.sequence, found.numbers) == (["a"], {"a": 3})


@pytest.mark.parametrize("annotation", [bytes, type, Callable[[int], int], list[bytes], dict[str, Callable], Sized])
def test_an_annotation_that_no_text_becomes_is_refused_when_the_parser_is_built(annotation):
    needed = make_dataclass("Odd", [("thing", annotation)])
    with pytest.raises(TypeError, match=r"Odd\.thing: .* cannot be written on a command line: .*Change the annotation"):
        HfArgumentParser(needed)


# What other programs read off the flags: shell completion, documentation.


def action_of(name, types=Everything):
    return next(one for one in HfArgumentParser(types)._actions if f"--{name}" in one.option_strings)


@pytest.mark.parametrize(
    ("name", "choices"),
    [("colour", ["red", "blue"]), ("size", ["small", "large"]), ("mode", ("fast", 2)), ("number", None)],
)
def test_a_flag_of_an_enum_or_a_literal_lists_its_values_as_choices(name, choices):
    assert action_of(name).choices == choices


@pytest.mark.parametrize(
    ("name", "type_"), [("number", int), ("rate", float), ("name", str), ("maybe", float), ("counts", int)]
)
def test_a_flag_shows_the_class_of_a_word_as_its_type_and_no_metavar(name, type_):
    action = action_of(name)
    assert action.type is type_ and action.metavar is None


def test_the_flag_that_switches_off_is_documented_and_off():
    action = action_of("no_fast_mode", Documented)
    assert (action.dest, action.const, action.default, action.nargs) == ("fast_mode", False, False, 0)
    assert action.help == action_of("fast_mode", Documented).help == "Fast."


def test_arguments_that_allow_a_few_texts_list_them_and_say_themselves_what_is_wrong():
    parser = HfArgumentParser(TrainingArguments)
    assert action_of("log_level", TrainingArguments).choices[:2] == ["detail", "debug"]
    assert action_of("ddp_backend", TrainingArguments).choices[:2] == ["nccl", "gloo"]
    with pytest.raises(ValueError, match="mean 'warning'"):
        parser.parse_args_into_dataclasses(["--output_dir", "o", "--log_level", "warnin"], look_for_args_file=False)
    assert train_args("--ddp_backend", "None").ddp_backend is None


def test_choices_of_a_list_are_checked_word_by_word(capsys):
    @dataclass
    class Choice:
        sizes: list[int] = field(default_factory=list, metadata={"choices": [1, 2]})

    assert parse("--sizes", "1", "2", types=Choice)[0].sizes == [1, 2]
    with pytest.raises(SystemExit):
        parse("--sizes", "1", "3", types=Choice)


# Dicts and files.


def test_a_dict_is_typed_by_the_fields():
    given = {
        "rate": "1e-4",
        "number": 3.0,
        "flag": "true",
        "colour": "blue",
        "counts": [1],
        "names": "one",
        "where": "w",
    }
    (found,) = HfArgumentParser(Everything).parse_dict(given)
    assert (found.rate, found.number, found.flag, found.colour) == (1e-4, 3, True, Colour.BLUE)
    assert (found.counts, found.names, found.where) == ([1], ["one"], Path("w"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": "fast"}, "rate: 'fast'"),
        ({"number": 2.5}, "number: 2.5"),
        ({"number": True}, "bool"),
        ({"mode": "x"}, "mode"),
    ],
)
def test_a_wrong_value_in_a_dict_names_its_key(given, message):
    with pytest.raises(ValueError) as caught:
        HfArgumentParser(Everything).parse_dict(given)
    assert message in str(caught.value)


def test_extra_keys_are_refused_or_allowed():
    parser = HfArgumentParser(Needed)
    with pytest.raises(
        ValueError, match=r"Some keys are not used by the HfArgumentParser: \['pth'\] Did you mean 'path'"
    ):
        parser.parse_dict({"path": "p", "pth": 1})
    assert parser.parse_dict({"path": "p", "more": 1}, allow_extra_keys=True) == (Needed("p"),)


def test_json_and_yaml_files_are_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"path": "p", "other": 2}, indent="\t"))
    (tmp_path / "a.yaml").write_text("path: p\nother: 1e3\n")
    parser = HfArgumentParser(Needed)
    assert parser.parse_json_file(tmp_path / "a.json") == (Needed("p", 2),)
    assert parser.parse_yaml_file(str(tmp_path / "a.yaml")) == (Needed("p", 1000),)
    with pytest.raises(ValueError, match="pth"):
        (tmp_path / "b.json").write_text('{"pth": 1}')
        parser.parse_json_file(tmp_path / "b.json")


def test_a_file_without_names_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="list"):
        HfArgumentParser(Needed).parse_yaml_file(tmp_path / "a.yaml")


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "path: [\n"), ("a.json", '{"path": ')])
def test_a_file_that_is_cut_short_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is not valid (YAML|JSON): .*line"):
        HfArgumentParser(Needed).parse_args_into_dataclasses([str(tmp_path / name)])


def test_flags_override_a_file_in_one_call(tmp_path):
    (tmp_path / "a.yaml").write_text("path: from_file\nother: 5\n")
    parser = HfArgumentParser(Needed)
    by_flag = parser.parse_with_file(["--yaml", str(tmp_path / "a.yaml"), "--other", "6"], file_flag="--yaml")
    leading = parser.parse_args_into_dataclasses([str(tmp_path / "a.yaml"), "--other", "6"])
    assert by_flag == leading == (Needed("from_file", 6),)
    assert parser.parse_with_file(["--config", str(tmp_path / "a.yaml")]) == (Needed("from_file", 5),)
    assert parser.parse_with_file(["--path", "p"]) == (Needed("p", 1),)


def test_of_two_files_the_later_wins_and_what_only_the_first_says_stays(tmp_path):
    (tmp_path / "a.yaml").write_text("path: from_a\nother: 5\n")
    (tmp_path / "b.json").write_text('{\n\t"other": 6}')
    words = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.json")]
    assert HfArgumentParser(Needed).parse_with_file(words) == (Needed("from_a", 6),)
    assert HfArgumentParser(Needed).parse_with_file(words[2:] + words[:2]) == (Needed("from_a", 5),)


def test_a_required_field_is_required_again_after_a_file_had_it(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"path": "p"}')
    parser = HfArgumentParser(Needed)
    parser.parse_with_file(["--config", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit):
        parser.parse_with_file([])


def test_a_file_with_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"path": "p", "othr": 1}')
    with pytest.raises(ValueError, match="Did you mean 'other'"):
        HfArgumentParser(Needed).parse_with_file(["--config", str(tmp_path / "a.json")])


def test_words_from_an_args_file_come_before_the_command_line(tmp_path):
    (tmp_path / "more.args").write_text("--number 5 --rate 2")
    parser = HfArgumentParser(Everything)
    found = parser.parse_args_into_dataclasses(["--number", "6"], args_filename=str(tmp_path / "more.args"))[0]
    flagged = parser.parse_args_into_dataclasses(["--file", str(tmp_path / "more.args")], args_file_flag="--file")[0]
    assert (found.number, found.rate, flagged.number) == (6, 2.0, 5)


def test_an_args_file_next_to_the_script_is_found(tmp_path, monkeypatch):
    (tmp_path / "train.args").write_text("--number 5")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py"), "--rate", "3"])
    found = HfArgumentParser(Everything).parse_args_into_dataclasses()[0]
    assert (found.number, found.rate) == (5, 3.0)
    assert HfArgumentParser(Everything).parse_args_into_dataclasses(look_for_args_file=False)[0].number == 3


def test_the_sample_of_seed_003_runs(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "dataset_name: glue\noutput_dir: out\ndo_train: true\neval_steps: null\nlearning_rate: 1e-4\nreport_to: none\n"
        "label_names: [a, b]\nlr_scheduler_kwargs: {num_cycles: 2}\neval_strategy: no\nlang: de\n"
    )
    given = ["--yaml", str(file), "--path", "a.txt", "--lang", "en"]
    first = ArgumentParser()
    first.add_argument("-y", "--yaml", type=str, required=False)
    args, others = first.parse_known_args(given)
    values = yaml.safe_load(Path(args.yaml).read_text())
    others = [x for k, v in values.items() for x in ["--" + k, str(v)]] + others
    parser = HfArgumentParser((DataTrainingArguments, ModelArguments, TrainingArguments))
    data, model, train = parser.parse_args_into_dataclasses(others)
    assert (data.lang, data.dataset_name, model.path) == ("en", "glue", "a.txt")
    assert (train.do_train, train.eval_steps, train.learning_rate, train.report_to) == (True, None, 1e-4, [])
    assert (train.label_names, train.lr_scheduler_kwargs, train.eval_strategy) == (["a", "b"], {"num_cycles": 2}, "no")
    again = HfArgumentParser((DataTrainingArguments, ModelArguments, TrainingArguments)).parse_with_file(
        given, "--yaml"
    )
    assert (
        again[0] == data
        and again[1] == model
        and again[2].to_dict() == {**train.to_dict(), "logging_dir": again[2].logging_dir}
    )


# TrainingArguments on a command line.


def train_args(*words):
    return parse("--output_dir", "o", "--report_to", "none", *words, types=TrainingArguments)[0]


def test_a_run_of_flags_gives_the_same_arguments_as_the_constructor():
    args = train_args(
        "--do_train", "--learning_rate", "2e-5", "--num_train_epochs", "3", "--bf16", "--no_dataloader_pin_memory"
    )
    assert (args.do_train, args.learning_rate, args.num_train_epochs, args.bf16) == (True, 2e-5, 3.0, True)
    assert args.dataloader_pin_memory is False


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--warmup_steps", "100"], "warmup_steps", 100),
        (["--save_steps", "0.25"], "save_steps", 0.25),
        (["--lr_scheduler_kwargs.min_lr", "1e-5"], "lr_scheduler_kwargs", {"min_lr": 1e-5}),
        (["--lr-scheduler-kwargs.min_lr=1e-5"], "lr_scheduler_kwargs", {"min_lr": 1e-5}),
        (
            ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'],
            "gradient_checkpointing_kwargs",
            {"use_reentrant": False},
        ),
        (["--optim_target_modules", "q", "v"], "optim_target_modules", ["q", "v"]),
        (["--optim_target_modules", "all-linear"], "optim_target_modules", "all-linear"),
        (["--fsdp", "full_shard auto_wrap"], "fsdp", ["full_shard", "auto_wrap"]),
        (["--fsdp", "true"], "fsdp", ["full_shard"]),
        (["--fsdp", ""], "fsdp", []),
        (["--include_num_input_tokens_seen", "non_padding"], "include_num_input_tokens_seen", "non_padding"),
        (["--include_num_input_tokens_seen", "true"], "include_num_input_tokens_seen", "all"),
        (["--trackio_static_space_id", "me/space"], "trackio_static_space_id", "me/space"),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--tf32", "None"], "tf32", None),
        (["--debug", "underflow_overflow"], "debug", ["underflow_overflow"]),
        (["--lr_scheduler_type", "cosine"], "lr_scheduler_type", "cosine"),
        (["--accelerator_config", '{"split_batches": true}', "--accelerator_config.even_batches", "false"], None, None),
    ],
)
def test_flags_of_every_kind(words, name, expected):
    args = train_args(*words)
    if name is None:
        assert (args.accelerator_config.split_batches, args.accelerator_config.even_batches) == (True, False)
    else:
        assert getattr(args, name) == expected


def test_one_key_changes_a_settings_file(tmp_path):
    (tmp_path / "fsdp.json").write_text('{\n\t"xla": false, "min_num_params": 3}')
    config = train_args("--fsdp_config", str(tmp_path / "fsdp.json"), "--fsdp_config.xla", "true").fsdp_config
    assert (config["xla"], config["min_num_params"]) == (True, 3)


def test_a_nested_key_leaves_the_default_as_it_is():
    default = {"outer": {"inner": 1, "other": 2}}

    @dataclass
    class Nested:
        settings: dict = field(default_factory=lambda: default)

    (found,) = parse("--settings.outer.inner", "5", types=Nested)
    assert found.settings == {"outer": {"inner": 5, "other": 2}}
    assert default == {"outer": {"inner": 1, "other": 2}}


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--evaluation_strategy", "epoch"], "eval_strategy", "epoch"),
        (["--per_gpu_train_batch_size", "16"], "per_device_train_batch_size", 16),
        (["--no_cuda"], "use_cpu", True),
        (["--dispatch-batches", "true"], "accelerator_config", None),
    ],
)
def test_older_flags_are_accepted_and_reported_at_the_callers_line(words, name, expected):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = train_args(*words)
    assert [(w.category, w.filename) for w in caught] == [(FutureWarning, __file__)]
    if expected is None:
        assert args.accelerator_config.dispatch_batches is True
    else:
        assert getattr(args, name) == expected


def test_older_keys_are_accepted_in_dicts():
    with pytest.warns(FutureWarning):
        (args,) = HfArgumentParser(TrainingArguments).parse_dict(
            {"output_dir": "o", "evaluation_strategy": "epoch", "report_to": "none"}
        )
    assert args.eval_strategy == "epoch"


def test_help_is_grouped_by_topic_and_explains_every_flag(capsys):
    parser = HfArgumentParser((Needed, TrainingArguments))
    text = parser.format_help()
    groups = [
        line
        for line in text.splitlines()
        if line.startswith(("Needed", "Run", "Optim", "Batch", "Interval", "Eval", "Prec", "Para", "Report", "Hub"))
    ]
    assert [line.split(":")[0] for line in groups] == [
        "Needed", "RunArguments", "OptimizationArguments", "BatchArguments", "IntervalArguments", "EvaluationArguments",
        "PrecisionArguments", "ParallelArguments", "ReportingArguments", "HubArguments",
    ]  # fmt: skip
    assert "about 10% of speed" in " ".join(text.split()) and "evaluation_strategy" not in text
    assert "Off: --no_dataloader_pin_memory" in " ".join(text.split())


def test_the_parser_imports_nothing_heavy():
    code = "import sys, trainwright.argparser; print([m for m in ('torch', 'yaml', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_usage_line_names_what_is_required_only():
    usage = HfArgumentParser((Needed, TrainingArguments), prog="train").format_usage()
    assert usage == "usage: train [-h] --path TEXT\n"


# HfArg, errors, help and files in detail.


def test_HfArg_keeps_metadata_and_passes_the_rest_to_the_field():
    aliases, metadata = ["-r"], {"mine": 1}

    @dataclass
    class Short:
        rate: float = HfArg(default=1.0, aliases=aliases, help="speed", metadata=metadata, repr=False)
        bare: int = HfArg(default=2)

    rate, bare = (Short.__dataclass_fields__[name] for name in ("rate", "bare"))
    assert dict(rate.metadata) == {"mine": 1, "aliases": ["-r"], "help": "speed"} and rate.repr is False
    assert rate.metadata["aliases"] is not aliases and metadata == {"mine": 1}
    assert dict(bare.metadata) == {} and Short() == Short(1.0, 2)


def test_one_dataclass_a_tuple_and_an_iterator_of_them_are_taken():
    for types in (Needed, (Needed,), iter([Needed])):
        assert HfArgumentParser(types).dataclass_types == [Needed]
    assert HfArgumentParser().dataclass_types == []


@pytest.mark.parametrize(
    ("wrong", "kind"), [(Needed("p"), "Needed"), ([3], "int"), (int, "int"), ([Needed, str], "str")]
)
def test_what_is_no_dataclass_is_named(wrong, kind):
    with pytest.raises(TypeError, match=f"needs dataclasses, not {kind}:"):
        HfArgumentParser(wrong)


def test_options_of_argparse_are_taken():
    parser = HfArgumentParser(Needed, prog="train", description="Trains.", formatter_class=HelpOfOthers)
    assert (parser.prog, parser.description) == ("train", "Trains.")
    assert parser.format_help() == "help of others"


class HelpOfOthers:
    def __init__(self, prog, **_):
        pass

    def __getattr__(self, name):
        return lambda *_: None

    def format_help(self):
        return "help of others"


def test_annotations_that_cannot_be_read_are_named():
    @dataclass
    class Local:
        thing: "Absent" = None  # noqa: F821

    with pytest.raises(TypeError, match=r"The annotations of Local cannot be read \(.*'Absent'.*module level"):
        HfArgumentParser(Local)


def help_of(types, **options):
    return HfArgumentParser(types, prog="train", **options).format_help()


@dataclass
class Documented:
    """What a script takes. More of it.

    And more.
    """

    count: int = field(default=3, metadata={"help": "How many."})
    words: list[str] = field(default_factory=list, metadata={"help": "Which."})
    table: dict = field(default_factory=dict, metadata={"help": "Of what."})
    text: str = field(default="", metadata={"help": "Empty."})
    maybe: str | None = field(default=None, metadata={"help": "None."})
    told: int = field(default=4, metadata={"help": "Says %(default)s itself."})
    shown_as: int = field(default=1, metadata={"metavar": "N", "help": "Named."})
    fast_mode: bool = field(default=True, metadata={"help": "Fast."})
    plain_mode: bool = field(default=False, metadata={"help": "Plain."})
    no_help: int = 5
    colour: Colour = Colour.RED
    many: str = field(default="a", metadata={"choices": list("abcdefghi")})
    eight: str = field(default="a", metadata={"choices": list("abcdefgh")})


def rows_of(text):
    """Flag -> its row of a help, in one line; rows begin with two spaces and a dash."""
    rows, name = {}, None
    for line in text.splitlines():
        if line.startswith("  -"):
            name = line.split()[0].rstrip(",")
            rows[name] = " ".join(line.split())
        elif line.startswith("   ") and name:
            rows[name] += " " + " ".join(line.split())
        else:
            name = None
    return rows


def test_each_row_of_a_help_says_what_a_flag_takes_and_its_default_where_that_says_something():
    text = help_of(Documented)
    rows = rows_of(text)
    assert "\nDocumented: What a script takes. More of it:\n" in text
    assert rows["--count"] == "--count INT How many. (default: 3)"
    assert rows["--words"].startswith("--words ") and rows["--words"].endswith(" Which.")
    assert rows["--table"].endswith(" Of what.") and rows["--text"].endswith(" Empty.")
    assert rows["--maybe"].endswith(" None.")
    assert rows["--told"].endswith(" Says 4 itself.")
    assert rows["--shown_as"] == "--shown_as N Named. (default: 1)"
    assert rows["--fast_mode"].endswith("Fast. Off: --no_fast_mode. (default: True)")
    assert rows["--plain_mode"].endswith("Plain. (default: False)")
    assert not any(row.startswith(("--no_fast_mode", "--no-")) for row in rows)
    assert "Off:" not in rows["--plain_mode"] and "--count-" not in text and "--shown-as" not in text
    assert rows["--no_help"].startswith("--no_help INT")
    assert "{red,blue}" in rows["--colour"] and "{a,b,c,d,e,f,g,h}" in rows["--eight"]
    assert rows["--many"].startswith("--many TEXT")
    assert rows["-h"].startswith("-h, --help ")


def test_a_class_without_words_of_its_own_is_a_title_alone():
    @dataclass
    class Bare:
        one: int = 1

    @dataclass
    class Named(Bare):
        """About two."""

        _argument_group_name: ClassVar[str]
        two: int = 2

    Named._argument_group_name = "Second part"
    text = help_of(Named)
    assert "\nBare:\n" in text and "\nSecond part:\n" in text
    Bare.__doc__ = None  # as `python -OO` leaves it
    assert "\nBare:\n" in help_of(Bare)
    assert text.index("\nBare:\n") < text.index("--one") < text.index("\nSecond part:\n") < text.index("--two")
    assert "\nDataOfMine:" not in help_of((Bare, Needed)) and help_of((Bare, Needed)).count("\nBare:\n") == 1


def test_the_usage_line_has_help_and_required_flags_of_a_parser_with_a_prefix():
    assert HfArgumentParser(Everything, prog="train").format_usage() == "usage: train [-h]\n"
    assert HfArgumentParser(Needed, prog="train", add_help=False).format_usage() == "usage: train --path TEXT\n"


def test_every_spelling_of_a_flag_is_taken_and_the_first_is_its_place():
    assert action_of("fast_mode", Documented).option_strings == ["--fast_mode", "--fast-mode"]
    assert action_of("no_fast_mode", Documented).option_strings == ["--no_fast_mode", "--no-fast-mode"]
    assert action_of("count", Documented).option_strings == ["--count"]
    assert action_of("count", Documented).help == "How many." and action_of("no_help", Documented).help is None
    assert (action_of("fast_mode", Documented).nargs, action_of("fast_mode", Documented).const) == ("?", True)
    assert action_of("words", Documented).nargs == "+"
    assert action_of("switch_or_text", Kinds).nargs == "?" and action_of("switch_or_text", Kinds).choices is None


def test_older_names_are_flags_that_no_help_shows():
    parser = HfArgumentParser(TrainingArguments)
    action = next(one for one in parser._actions if one.dest == "evaluation_strategy")
    assert action.option_strings == ["--evaluation_strategy", "--evaluation-strategy"]
    assert action.default is SUPPRESS and action.help is SUPPRESS


def test_metadata_may_say_how_many_words_a_flag_takes():
    @dataclass
    class Pair:
        both: list[int] = field(default_factory=list, metadata={"nargs": 2})

    assert parse("--both", "1", "2", types=Pair)[0].both == [1, 2]
    with pytest.raises(SystemExit):
        parse("--both", "1", types=Pair)


def test_a_required_switch_is_off_unless_it_is_there():
    @dataclass
    class Switch:
        on: bool
        also: bool | None

    assert parse("--also", "None", types=Switch)[0] == Switch(False, None)
    assert parse("--on", "--also", types=Switch)[0] == Switch(True, True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--settings.a"], {"a": True}),
        (["--settings.a", "--flag"], {"a": True}),
        (["--settings.a", "1", "--settings.b"], {"a": 1, "b": True}),
        (["--settings.a="], {"a": ""}),
        (["--settings.a=x=y"], {"a": "x=y"}),
        (["--settings.a", "--settings.b=2"], {"a": True, "b": 2}),
        (["--settings.a.b", "1", "--settings.a.b", "2"], {"a": {"b": 2}}),
        (["--settings", '{"a": {"b": 1}}', "--settings.a.c", "2"], {"a": {"b": 1, "c": 2}}),
    ],
)
def test_single_keys_of_a_dict(words, expected):
    assert parse(*words)[0].settings == expected


def test_a_word_with_a_point_that_names_no_dict_is_left_to_argparse():
    assert parse("--number.a", "1", return_remaining_strings=True)[1] == ["--number.a", "1"]
    assert parse("settings.a", return_remaining_strings=True)[1] == ["settings.a"]
    assert parse("--name", "a.b")[0].name == "a.b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--numbers.a", "many"], "--numbers.a: "),
        (["--numbers.a.b", "1"], "--numbers.a.b: "),
        (["--inner.size.deep", "1"], "--inner.size.deep: 'size' holds 1, which is no dict"),
    ],
)
def test_a_key_that_cannot_be_set_ends_with_its_whole_name(words, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as left:
        parse(*words, types=Kinds)
    assert message in (str(left.value) + capsys.readouterr().err)


def test_a_key_below_a_value_ends_with_the_value(capsys):
    with pytest.raises(SystemExit):
        parse("--settings.a.b", "1", "--settings.a.b.c", "2")
    assert "--settings.a.b.c: 'b' holds 1, which is no dict" in capsys.readouterr().err


def test_a_key_of_what_is_no_dict_ends_with_what_it_is(capsys):
    @dataclass
    class Either:
        table: dict | str = "text"
        path: Any = None

    with pytest.raises(SystemExit) as left:
        parse("--table.a.b", "1", types=Either)
    assert left.value.code == 2
    assert "--table.a.b changes one key, but --table is 'text', which is no dict" in capsys.readouterr().err


def test_what_argparse_does_not_know_is_an_error_that_hides_values(capsys):
    parser = HfArgumentParser(Everything, prog="train")
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["more", f"--nmber={'secret' * 5}", "--Api_key", "hidden", "-x", "-5"])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "train: error: unrecognized arguments: more --nmber --Api_key -x Did you mean '--number'?\n"
        "See `train --help`.\n"
    )


def test_an_abbreviation_of_several_flags_is_named_without_its_value(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(Everything, prog="train").parse_args(["--na=sec\nret"])
    error = capsys.readouterr().err
    assert "sec" not in error and "ambiguous option: --na could match --name, --names" in error


def test_words_left_over_are_named_without_values_and_with_the_nearest_flag():
    with pytest.raises(ValueError) as caught:
        parse(f"--nmber={'secret' * 5}", "--raet", "7")
    assert str(caught.value).endswith(
        "HfArgumentParser: ['--nmber', '--raet'] Did you mean '--number'? Did you mean '--rate'?"
    )


def test_parsing_plainly_reads_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--number", "7"])
    assert HfArgumentParser(Everything).parse_args().number == 7
    assert HfArgumentParser(Everything).parse_known_args()[0].number == 7
    mine = Namespace(mine=1)
    namespace = HfArgumentParser(Everything).parse_args(["--rate", "2"], namespace=mine)
    assert namespace is mine and (namespace.rate, namespace.mine) == (2.0, 1)
    assert HfArgumentParser(Everything).parse_args_into_dataclasses()[0].number == 7


def test_a_file_and_flags_of_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "a.yml").write_text("path: from_file\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "a.yml"), "--other", "6"])
    assert HfArgumentParser(Needed).parse_with_file() == (Needed("from_file", 6),)
    words = ["--config", str(tmp_path / "a.yml"), "--odd", "1"]
    assert HfArgumentParser(Needed).parse_with_file(words, return_remaining_strings=True) == (
        Needed("from_file"),
        ["--odd", "1"],
    )
    with pytest.raises(ValueError, match="'--odd'"):
        HfArgumentParser(Needed).parse_with_file(words)


@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.yml"])
def test_a_file_may_be_the_first_word_unless_the_script_has_words_of_its_own(tmp_path, name):
    (tmp_path / name).write_text('{"path": "from_file"}')
    first = str(tmp_path / name)
    assert HfArgumentParser(Needed).parse_args_into_dataclasses([first]) == (Needed("from_file"),)
    parser = HfArgumentParser(Needed)
    parser.add_argument("script")
    needed, namespace = parser.parse_args_into_dataclasses([first, "--path", "p"])
    assert (needed, namespace.script) == (Needed("p"), first)
    assert parse("other.txt", return_remaining_strings=True)[1] == ["other.txt"]


def test_words_of_files_come_in_the_order_named_file_flags_command_line(tmp_path, monkeypatch):
    for name, text in (("a.args", "--number 1 --rate 1 --name a"), ("b.args", "--number 2 --rate 2")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "a.py")])
    found = HfArgumentParser(Everything).parse_args_into_dataclasses(
        ["--more", str(tmp_path / "b.args"), "--more", str(tmp_path / "absent.args"), "--number", "3"],
        args_file_flag="--more",
    )[0]
    assert (found.number, found.rate, found.name) == (3, 2.0, "a")
    files = {"args_filename": str(tmp_path / "b.args"), "args_file_flag": "--more"}
    both = HfArgumentParser(Everything).parse_args_into_dataclasses(["--more", str(tmp_path / "a.args")], **files)[0]
    assert (both.number, both.rate) == (1, 1.0)
    only = HfArgumentParser(Everything).parse_args_into_dataclasses([], args_filename=str(tmp_path / "b.args"))[0]
    assert (only.number, only.name) == (2, "a") and Everything().name == "a"
    assert only.rate == 2.0
    monkeypatch.setattr(sys, "argv", [""])
    assert HfArgumentParser(Everything).parse_args_into_dataclasses()[0] == Everything()
    monkeypatch.setattr(sys, "argv", [])
    assert HfArgumentParser(Everything, prog="train").parse_args_into_dataclasses()[0] == Everything()


def test_what_equals_its_default_is_not_passed_on():
    passed = []

    @dataclass
    class Noticing:
        number: int = 3
        rate: float = 1
        words: list = field(default_factory=list)

        def __new__(cls, **given):
            passed.append(given)
            return object.__new__(cls)

    parse("--number", "3", types=Noticing)
    parse("--number", "4", "--rate", "1", "--words", "a", types=Noticing)  # 1.0 == 1, and is of another type
    assert passed == [{}, {"number": 4, "rate": 1.0, "words": ["a"]}]


def test_an_argument_of_ours_leaves_its_name_to_a_script():
    @dataclass
    class Ours:
        packing: bool = field(default=False, metadata={"extension": True})
        level: str = field(default="a", metadata={"extension": True, "choices": ["a", "b"]})

    @dataclass
    class Script:
        packing: int = 7

    ours, script = parse("--packing", "9", "--level", "c", types=(Ours, Script))
    assert (ours.packing, ours.level, script.packing) == (False, "c", 9)
    assert parse("--packing", types=Ours)[0].packing is True
    found = HfArgumentParser((Ours, Script)).parse_dict({"packing": "8"})
    assert (found[0].packing, found[1].packing) == (False, 8)


def test_extra_keys_of_files_are_refused_or_allowed(tmp_path):
    (tmp_path / "a.json").write_text('{"path": "p", "pth": 1}')
    (tmp_path / "a.yaml").write_text("path: p\npth: 1\n")
    parser = HfArgumentParser(Needed)
    for parse_file, name in ((parser.parse_json_file, "a.json"), (parser.parse_yaml_file, "a.yaml")):
        assert parse_file(tmp_path / name, allow_extra_keys=True) == (Needed("p"),)
        with pytest.raises(ValueError, match="pth"):
            parse_file(tmp_path / name)
    with pytest.raises(ValueError, match=r"HfArgumentParser: \['1', 'pth'\] Did you mean 'path'\?$"):
        parser.parse_dict({"path": "p", "pth": 1, 1: 2})


def test_the_kind_of_a_file_is_that_of_the_method_whatever_it_is_called(tmp_path):
    (tmp_path / "a.txt").write_text('{\n\t"path": "p\u00e9"}', encoding="utf-8")  # a tab is an error in YAML
    assert HfArgumentParser(Needed).parse_json_file(tmp_path / "a.txt") == (Needed("p\u00e9"),)
    (tmp_path / "b.json").write_text("path: p\n")
    assert HfArgumentParser(Needed).parse_yaml_file(tmp_path / "b.json") == (Needed("p"),)


def test_an_empty_file_has_no_values_and_another_kind_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("")
    assert HfArgumentParser(Everything).parse_yaml_file(tmp_path / "a.yaml") == (Everything(),)
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"b\.json holds a list; names and values are needed"):
        HfArgumentParser(Needed).parse_json_file(tmp_path / "b.json")


def test_reading_yaml_without_its_package_names_it(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("path: p\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"Reading .*a\.yaml needs PyYAML.*trainwright\[yaml\]"):
        HfArgumentParser(Needed).parse_yaml_file(tmp_path / "a.yaml")


def test_a_name_that_is_near_no_other_is_not_guessed():
    with pytest.raises(ValueError, match=r"\['zzzzzz'\]$"):
        HfArgumentParser(Needed).parse_dict({"path": "p", "zzzzzz": 1})


def test_a_field_of_values_keeps_values_from_a_dict_too():
    @dataclass
    class Raw:
        colour: Colour = "red"

    globals()["Raw"] = Raw
    assert HfArgumentParser(Raw).parse_dict({"colour": "blue"})[0].colour == "blue"


def test_an_alias_may_be_one_text_and_each_is_shown_in_a_help():
    @dataclass
    class Short:
        rate: float = field(default=1.0, metadata={"aliases": ["--lr", "-r"]})
        words: list[str] = field(default_factory=list, metadata={"aliases": "-w"})

    assert parse("-w", "a", types=Short)[0].words == ["a"]
    rows = rows_of(help_of(Short))
    assert rows["--rate"].startswith("--rate, --lr, -r NUMBER") and rows["--words"].startswith("--words, -w ")


def test_the_row_of_a_required_field_says_what_it_is():
    assert rows_of(help_of(Needed))["--path"] == "--path TEXT where"


def test_arguments_of_a_script_are_shown_as_argparse_does_with_one_spelling():
    parser = HfArgumentParser(Needed, prog="train")
    parser.add_argument("script", help="What to run.")
    parser.add_argument("-n", "--dry-run", action="store_true", help="Only say so.")
    parser.add_argument("--to-file", "--to-path", help="Where.")
    text = parser.format_help()
    rows = rows_of(text)
    assert "\n  script " in text
    assert rows["-n"].startswith("-n, --dry-run Only say so.") and rows["--to-file"] == "--to-file TO_FILE Where."


def test_a_usage_of_the_script_is_shown_and_commands_are_called_after_it():
    assert HfArgumentParser(Needed, usage="train FILE").format_usage() == "usage: train FILE\n"
    parser = HfArgumentParser(prog="train")
    assert parser.add_subparsers().add_parser("go").prog == "train go"


def test_help_with_a_flag_for_files_is_that_of_the_parser(capsys):
    with pytest.raises(SystemExit) as left:
        HfArgumentParser(Needed).parse_with_file(["--help"])
    assert left.value.code == 0 and "--path" in capsys.readouterr().out


def test_a_flag_for_files_is_not_abbreviated():
    @dataclass
    class Near:
        conf: str = "a"

    assert HfArgumentParser(Near).parse_with_file(["--conf", "b"]) == (Near("b"),)


def test_words_that_are_no_flags_are_named_when_they_are_left_over():
    with pytest.raises(ValueError, match=r"\['more', 'words'\]$"):
        parse("more", "words")


def test_a_file_may_hold_arguments_that_a_script_added_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("path: p\nmine: 5\n")
    parser = HfArgumentParser(Needed)
    parser.add_argument("--mine", type=int, default=0)
    needed, rest = parser.parse_with_file(["--config", str(tmp_path / "a.yaml")])
    assert (needed, rest.mine) == (Needed("p"), 5)
