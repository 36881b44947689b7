"""A file of settings, and words of a command line that override it, as nested dicts.

Owns: YAML and JSON, `--section.option value`, `ConfigFileError`. Leaves to others: what the settings mean (`check.py`).
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trainwright.names import closest

SUFFIXES = (".yaml", ".yml", ".json")
COMMAND_LINE = "command line"


class ConfigFileError(ValueError):
    """The file or the command line is wrong: a line for each mistake, each with its place and what is allowed."""


@dataclass
class Settings:
    """What was asked for: `values` by section, and which of their dotted names came from the command line."""

    path: str
    values: dict[str, Any]
    overridden: set[str] = field(default_factory=set)

    def place(self, name: str) -> str:
        """Where the setting `name` (dotted) was written: the file, or the command line."""
        parts = name.split(".")
        names = {".".join(parts[:number]) for number in range(1, len(parts) + 1)}
        inner = any(one.startswith(f"{name}.") for one in self.overridden)
        return COMMAND_LINE if inner or names & self.overridden else self.path


def read(path: str, overrides: Sequence[str] = ()) -> Settings:
    """The settings of the file `path`, changed by `overrides`, as `["--training.max_steps", "5"]`.

    ConfigFileError where one of them cannot be read.
    """
    settings = Settings(path, _read_file(path))
    for name, text in _overrides(overrides):
        _put(settings, name, text)
    return settings


def _read_file(path: str) -> dict[str, Any]:
    if not path.endswith(SUFFIXES):
        raise ConfigFileError(f"{path}: a file of settings ends in one of {', '.join(SUFFIXES)}.")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        near = closest(os.path.basename(path), os.listdir(folder)) if os.path.isdir(folder) else ""
        raise ConfigFileError(f"There is no file {path}.{near} `trainwright init TASK {path}` writes one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{path} cannot be read: {error}.") from None
    if path.endswith(".json"):
        try:
            found = json.loads(text, object_pairs_hook=_without_twins)
        except ValueError as error:
            raise ConfigFileError(f"{path} is not valid JSON: {error}.") from None
    else:
        try:
            found = parse_yaml(text)
        except ValueError as error:
            raise ConfigFileError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(found, dict):
        raise ConfigFileError(f"{path} holds no sections, such as task and model. `trainwright init` writes some.")
    return found


def parse_yaml(text: str) -> Any:
    """`text` as YAML 1.2 reads it: 1e-4 is a number, `no` and `off` are texts. ValueError where it is none, or where a
    key is written twice.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigFileError("Reading YAML needs PyYAML. Run: pip install 'trainwright[yaml]'") from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [pair for pair in pairs if pair[0] not in _OTHER_IN_1_2]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                name = str(key.value)
                if name in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{name!r} is written twice", key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    for tag, (pattern, first) in _OTHER_IN_1_2.items():
        Loader.add_implicit_resolver(tag, re.compile(pattern), list(first))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(f"{where}{getattr(error, 'problem', None) or error}") from None


# Tag -> (what it looks like, how it begins). YAML 1.1, which PyYAML reads, has dates, `no`, and 1e-4 as a text.
_OTHER_IN_1_2 = {
    "tag:yaml.org,2002:bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    "tag:yaml.org,2002:int": (r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    "tag:yaml.org,2002:timestamp": (r"^(?!)", "0123456789"),
}


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is written twice")
    return dict(pairs)


def _overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """(dotted name, value) of each override. A name without a value is a switch: true."""
    found: list[tuple[str, Any]] = []
    number = 0
    while number < len(words):
        word = words[number]
        if not re.match(r"--[A-Za-z]", word):
            raise ConfigFileError(
                f"{COMMAND_LINE}: {word!r} belongs to no setting. Write --section.option value, such as "
                "--training.learning_rate 1e-4."
            )
        flag, equals, text = word[2:].partition("=")
        number += 1
        if not equals:
            has_value = number < len(words) and not words[number].startswith("--")
            text = words[number] if has_value else "true"
            number += has_value
        first, dot, rest = flag.partition(".")
        flag = f"{first}{dot}{rest.replace('-', '_')}"
        try:
            found.append((flag, parse_yaml(text)))
        except ConfigFileError:
            raise
        except ValueError as error:
            raise ConfigFileError(f"{COMMAND_LINE}: --{flag} is not valid YAML: {error}.") from None
    return found


def _put(settings: Settings, name: str, value: Any) -> None:
    *sections, last = name.split(".")
    if not all([*sections, last]):
        raise ConfigFileError(f"{COMMAND_LINE}: --{name} has an empty part. Write --section.option value.")
    settings.values = copy.deepcopy(settings.values)
    inner = settings.values
    for number, part in enumerate(sections, start=1):
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            outer = ".".join(sections[:number])
            raise ConfigFileError(f"{COMMAND_LINE}: --{name} is to set an option of {outer}={inner!r}, no section.")
    inner[last] = value
    settings.overridden.add(name)
