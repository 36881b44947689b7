"""The flags that our parser and the documented one build of the same dataclass, attribute by attribute."""

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers.hf_argparser import HfArgumentParser as Reference

from trainwright import HfArgumentParser


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Size(str, Enum):
    SMALL = "small"
    LARGE = "large"


class Number(Enum):
    ONE = 1
    TWO = 2


REQUIRED = dataclasses.MISSING
# name -> (annotation, default); a list, set or dict as default is made anew.
SAME: dict[str, tuple[Any, Any]] = {
    "number": (int, 3),
    "needed": (int, REQUIRED),
    "rate": (float, 0.1),
    "text": (str, "a"),
    "text_or_nothing": (str, None),
    "needed_text": (str, REQUIRED),
    "maybe_number": (int | None, None),
    "maybe_rate": (float | None, 2.0),
    "maybe_text": (str | None, None),
    "written": ("int | None", None),
    "off": (bool, False),
    "on": (bool, True),
    "needed_switch": (bool, REQUIRED),
    "maybe_on": (bool | None, True),
    "maybe_off": (bool | None, False),
    "enum_member": (Colour, Colour.RED),
    "enum_value": (Colour, "red"),
    "needed_enum": (Colour, REQUIRED),
    "text_enum": (Size, Size.SMALL),
    "number_enum": (Number, Number.ONE),
    "maybe_enum": (Colour | None, None),
    "maybe_enum_member": (Size | None, Size.LARGE),
    "literal": (Literal["a", "b"], "a"),
    "needed_literal": (Literal["a", "b"], REQUIRED),
    "mixed_literal": (Literal["a", 2], "a"),
    "number_literal": (Literal[1, 2], 1),
    "maybe_literal": (Literal["a", "b"] | None, None),
    "numbers": (list[int], [1, 2]),
    "no_numbers": (list[int], []),
    "needed_texts": (list[str], REQUIRED),
    "rates": (list[float], [0.1]),
    "maybe_numbers": (list[int] | None, None),
    "maybe_texts": ("list[str] | None", None),
    "literals": (list[Literal["a", "b"]], ["a"]),
    "maybe_literals": (list[Literal["a", "b"]] | None, None),
    "enums": (list[Colour], [Colour.RED]),
    "settings": (dict, {}),
    "maybe_settings": (dict | None, None),
    "settings_or_text": (dict | str | None, None),
    "number_or_text": (int | str, "a"),
    "text_or_number": (str | int, "a"),
    "switch_or_text": (bool | str, False),
    "text_or_switch": (str | bool, "a"),
    "path": (Path, Path("a")),
    "maybe_path": (Path | None, None),
    "complex_number": (complex, 1j),
}
# What differs by choice, listed in docs/parity.md: name -> (annotation, default, attributes that differ).
DIFFERENT: dict[str, tuple[Any, Any, set[str]]] = {
    # The flag alone is True, as for any other switch.
    "unsure": (bool | None, None, {"nargs", "const"}),
    # Several words, and the type of one: theirs reads one word as the whole.
    "several": (tuple[int, ...], (1, 2), {"nargs", "type"}),
    "pair": (tuple[int, str], (1, "a"), {"nargs", "type"}),
    "names": (set[str], {"a"}, {"nargs", "type"}),
    "sequence": (Sequence[str], ("a",), {"nargs", "type"}),
    "iterable": (Iterable[str] | None, None, {"nargs", "type"}),
    # Theirs forgets the default, and "bool" makes True of every text.
    "text_or_list": (str | list[str], "a", {"default"}),
    "switches": (list[bool], [True], {"type"}),
    # A function that reads JSON; theirs calls what is no class.
    "anything": (Any, None, {"type"}),
}
ATTRIBUTES = ("option_strings", "dest", "nargs", "const", "default", "type", "choices", "required", "help", "metavar")


def made(name: str, annotation: Any, default: Any, **metadata: Any) -> type:
    if isinstance(default, (list, set, dict)):
        value = dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    elif default is REQUIRED:
        value = dataclasses.field(metadata=metadata)
    else:
        value = dataclasses.field(default=default, metadata=metadata)
    return dataclasses.make_dataclass("Made", [(name, annotation, value)], namespace={"__module__": __name__})


def shown(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """The attributes of every flag; of a function as `type`, that it is one."""
    rows = []
    for action in parser._actions:
        if action.dest != "help":
            row = {name: getattr(action, name) for name in ATTRIBUTES} | {"class": type(action)}
            is_class = isinstance(action.type, type) or action.type is None
            rows.append({**row, "type": action.type if is_class else "a function"})
    return rows


def differing(name: str, annotation: Any, default: Any, **metadata: Any) -> set[str]:
    made_class = made(name, annotation, default, **metadata)
    ours, theirs = shown(HfArgumentParser(made_class)), shown(Reference(made_class))
    assert len(ours) == len(theirs)
    return {key for left, right in zip(ours, theirs) for key in left if left[key] != right[key]}


@pytest.mark.parametrize("metadata", [{}, {"help": "what it is"}, {"aliases": ["-x", "--other"]}])
@pytest.mark.parametrize("name", SAME)
def test_a_flag_looks_to_argparse_as_the_documented_one(name: str, metadata: dict[str, Any]) -> None:
    assert differing(name, *SAME[name], **metadata) == set()


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_flag_differs_by_choice_in_these_attributes(name: str) -> None:
    annotation, default, attributes = DIFFERENT[name]
    assert differing(name, annotation, default) == attributes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number", ["7"]),
        ("maybe_number", ["7"]),
        ("off", []),
        ("off", ["true"]),
        ("on", ["no"]),
        ("needed_switch", []),
        ("enum_value", ["blue"]),
        ("maybe_enum", ["red"]),
        ("literal", ["b"]),
        ("mixed_literal", ["2"]),
        ("number_literal", ["2"]),
        ("numbers", ["3", "4"]),
        ("maybe_texts", ["a"]),
        ("enums", ["blue", "red"]),
        ("number_or_text", ["5"]),
        ("switch_or_text", []),
        ("path", ["a/b"]),
    ],
)
def test_words_become_the_documented_value(name: str, words: list[str]) -> None:
    ours, theirs = values_of(name, words)
    assert ours == theirs and type(ours) is type(theirs)


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("enum_member", ["blue"], Colour.BLUE),  # a member, as the default is one; theirs is its value
        ("text_enum", ["large"], Size.LARGE),
        ("switch_or_text", ["yes"], "yes"),  # where text is allowed, "yes" is text
        ("number_or_text", ["five"], "five"),  # theirs refuses what is no number
        ("literals", ["a", "b"], ["a", "b"]),  # theirs cannot read them
        ("numbers", ["[3, 4]"], [3, 4]),  # as `str(list)` writes them
        ("maybe_number", ["None"], None),
    ],
)
def test_words_become_another_value_by_choice(name: str, words: list[str], expected: Any) -> None:
    ours, theirs = values_of(name, words)
    assert ours == expected and type(ours) is type(expected)
    assert (theirs, type(theirs)) != (ours, type(ours))


def values_of(name: str, words: list[str]) -> tuple[Any, Any]:
    """What ours and theirs make of the words; of an error, its class."""
    made_class, found = made(name, *SAME[name]), []
    parsers: list[Any] = [HfArgumentParser(made_class), Reference(made_class)]
    for parser in parsers:
        try:
            found.append(getattr(parser.parse_args_into_dataclasses([f"--{name}", *words])[0], name))
        except (SystemExit, TypeError, ValueError) as error:
            found.append(type(error))
    return found[0], found[1]


@pytest.mark.parametrize("given", [{"literal": "b"}, {"numbers": [4], "off": True}, {"enum_value": "blue"}])
def test_a_file_becomes_the_documented_values(given: dict[str, Any], tmp_path: Path) -> None:
    fields = [
        (name, SAME[name][0], dataclasses.field(default_factory=lambda name=name: SAME[name][1])) for name in given
    ]
    made_class = dataclasses.make_dataclass("Made", fields)
    (tmp_path / "a.json").write_text(json.dumps(given))
    found: list[Any] = [
        parser(made_class).parse_json_file(str(tmp_path / "a.json"))[0] for parser in (HfArgumentParser, Reference)
    ]
    assert found[0] == found[1]
