"""Dataclasses as command lines: `HfArgumentParser` makes a flag of every field, `HfArg` writes a field with its help.

Owns: flags, groups of `--help`, JSON and YAML files, files overridden by flags. Leaves to others: what values mean
(each dataclass checks itself), turning one text into one type (`argtypes.py`). Standard library only; YAML is imported
when a YAML file is read. Source: seed 003.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from trainwright.argtypes import (
    READABLE,
    accepts_dict,
    accepts_sequence,
    argparse_type,
    choices_of,
    convert,
    describe,
    is_boolean,
    is_readable,
    is_switch_or_text,
    named,
    parse_literal,
)

FILE_SUFFIXES = (".json", ".yaml", ".yml")


def HfArg(
    *,
    aliases: str | list[str] | None = None,
    help: str | None = None,
    default: Any = dataclasses.MISSING,
    default_factory: Callable[[], Any] | Any = dataclasses.MISSING,
    metadata: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A dataclass field with help and aliases: `lr: float = HfArg(default=1e-3, aliases=["--rate"], help="...")`."""
    found = dict(metadata or {})
    if aliases is not None:
        found["aliases"] = [aliases] if isinstance(aliases, str) else list(aliases)
    if help is not None:
        found["help"] = help
    return dataclasses.field(metadata=found, default=default, default_factory=default_factory, **kwargs)


class HfArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose arguments are the fields of dataclasses.

    Flags are written with underscores or dashes. A boolean needs no value, and one that is True by default can be
    switched off with `--no_<name>`. A field that holds a dict takes JSON text or single keys, `--<name>.<key> <value>`.
    `None` spells None for an optional field; for optional text only exactly so, because "none" and "null" may be names.

    Arguments that you add yourself with `add_argument` come back in a namespace after the dataclasses.
    """

    def __init__(self, dataclass_types: type | Iterable[type] | None = None, **kwargs: Any) -> None:
        """
        Args:
            dataclass_types: one dataclass or several; the parse methods return one instance of each, in this order.
            kwargs: for `argparse.ArgumentParser`.
        """
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(**kwargs)
        if dataclass_types is None:
            dataclass_types = ()
        elif not isinstance(dataclass_types, Iterable) or isinstance(dataclass_types, type):
            dataclass_types = (dataclass_types,)
        self.dataclass_types: list[Any] = list(dataclass_types)
        self._dict_hints: dict[str, Any] = {}
        self._groups: dict[str, Any] = {}
        self._hints: dict[Any, dict[str, Any]] = {}
        self._left_out: dict[Any, set[str]] = {}
        for one in self.dataclass_types:
            if not (isinstance(one, type) and dataclasses.is_dataclass(one)):
                kind = type(one).__name__ if not isinstance(one, type) else one.__name__
                raise TypeError(
                    f"HfArgumentParser needs dataclasses, not {kind}: pass the class itself, decorated with @dataclass."
                )
        for one in self.dataclass_types:
            self._left_out[one] = self._redefined_by_others(one)
            self._add_dataclass_arguments(one)

    # Fields to flags.

    def _add_dataclass_arguments(self, dataclass_type: Any) -> None:
        try:
            hints = typing.get_type_hints(dataclass_type)
        except NameError as error:
            raise TypeError(
                f"The annotations of {dataclass_type.__name__} cannot be read ({error}): define the types at module "
                "level."
            ) from None
        self._hints[dataclass_type] = hints
        for field in _init_fields(dataclass_type):
            if field.name in self._left_out[dataclass_type]:
                continue
            if _default(field) is dataclasses.MISSING and not is_readable(hints[field.name]):
                raise TypeError(
                    f"{dataclass_type.__name__}.{field.name}: {named(hints[field.name])} cannot be written on a "
                    f"command line: {READABLE}. Change the annotation, or give the field a default or "
                    "field(init=False)."
                )
            self._add_field(self._group_of(dataclass_type, field.name), field, hints[field.name])
        for name in getattr(dataclass_type, "_hidden_arguments", ()):
            self.add_argument(*_flags(name), dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def _redefined_by_others(self, dataclass_type: Any) -> set[str]:
        """Extensions of this library (`option(extension=True)`) whose name another dataclass of the script defines:
        they keep their defaults, so that a script written without them runs.
        """
        others = {field.name for one in self.dataclass_types for field in _init_fields(one) if not _is_ours(field)}
        return {field.name for field in _init_fields(dataclass_type) if _is_ours(field) and field.name in others}

    def _group_of(self, dataclass_type: Any, name: str) -> Any:
        """One group of `--help` per dataclass; inherited fields appear under the class that introduced them."""
        owner = next(base for base in reversed(dataclass_type.__mro__) if name in inspect.get_annotations(base))
        title = getattr(owner, "_argument_group_name", None) or _first_line(owner)
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def _add_field(self, group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
        aliases = field.metadata.get("aliases", [])
        flags = [*_flags(field.name), *([aliases] if isinstance(aliases, str) else aliases)]
        default = _default(field)
        options: dict[str, Any] = {"dest": field.name, "help": field.metadata.get("help")}
        # Members of plain enums are passed by value, as scripts expect, unless the default is a member.
        checks_itself = "extension" in field.metadata  # a field of ours: its own check suggests the nearest
        reading = _Reading(hint, isinstance(default, Enum), None if checks_itself else field.metadata.get("choices"))
        options["type"] = argparse_type(hint) or reading.read
        options.update({key: field.metadata[key] for key in ("choices", "metavar", "nargs") if key in field.metadata})
        if is_boolean(hint):
            default = False if default is dataclasses.MISSING else default
        if is_boolean(hint) or is_switch_or_text(hint):
            options.update(nargs="?", const=True)
        elif reading.takes_words:
            options.setdefault("nargs", "+")
        else:
            options.setdefault("choices", choices_of(hint))
        if accepts_dict(hint):
            self._dict_hints[field.name] = hint
        if default is dataclasses.MISSING:
            action = group.add_argument(*flags, required=True, **options)
        else:
            action = group.add_argument(*flags, default=default, **options)
        action.reading = reading
        if is_boolean(hint) and default is True:
            off = [f"--no_{field.name}", *([f"--no-{field.name.replace('_', '-')}"])]
            help = field.metadata.get("help")
            complement = group.add_argument(*off, action="store_false", dest=field.name, default=False, help=help)
            action.off, complement.is_complement = off[0], True

    # Overrides that argparse calls for each flag. A field is converted by its annotation, not by `type`, which is there
    # for other programs (shell completion).

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        reading = getattr(action, "reading", None)
        if reading is None or not reading.takes_words:
            return super()._get_values(action, arg_strings)  # type: ignore[misc]
        value = self._get_value(action, arg_strings[0] if len(arg_strings) == 1 else arg_strings)
        for item in [value] if isinstance(value, str) or not isinstance(value, Iterable) else value:
            self._check_value(action, item)
        return value

    def _get_value(self, action: argparse.Action, arg_string: Any) -> Any:
        reading = getattr(action, "reading", None)
        if reading is None:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        try:
            return reading.read(arg_string)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(action, str(error)) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        reading = getattr(action, "reading", None)
        if reading is None or (reading.choices is not None and value is not None):
            super()._check_value(action, value)  # type: ignore[misc]

    # Command lines.

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; `--<dict field>.<key> <value>` goes into the dict."""
        tokens = list(sys.argv[1:] if args is None else args)
        dotted, rest = self._take_dotted(tokens)
        namespace, remaining = super().parse_known_args(rest, namespace)
        for name, keys, value in dotted:
            changed = self._with_key(name, getattr(namespace, name), keys, value)
            try:
                setattr(namespace, name, convert(changed, self._dict_hints[name]))
            except (TypeError, ValueError) as error:
                self.error(f"--{name}.{'.'.join(keys)}: {error}")
        return namespace, remaining

    def parse_args_into_dataclasses(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        look_for_args_file: bool = True,
        args_filename: str | None = None,
        args_file_flag: str | None = None,
    ) -> tuple[Any, ...]:
        """Parse a command line into one instance of each dataclass.

        A first argument that names a .json, .yaml or .yml file is read before the flags, which override it.

        Args:
            args: the words; None: those of the command line.
            return_remaining_strings: append the words that no flag takes, instead of raising.
            look_for_args_file: read `<script>.args` next to the script; its words come before the command line's.
            args_filename: read this file of words instead.
            args_file_flag: a flag that names further files of words, such as "--args_file".

        Returns:
            one instance per dataclass, then a namespace of arguments you added yourself if there are any, then the
            remaining words if `return_remaining_strings`.

        Raises:
            ValueError: words are left that no flag takes; the message suggests the nearest flag.
        """
        tokens = list(sys.argv[1:] if args is None else args)
        files: list[str] = []
        if args_file_flag:
            files, tokens = _take_flag(args_file_flag, tokens)
        if args_filename:
            files.insert(0, args_filename)
        elif look_for_args_file and sys.argv and sys.argv[0]:
            files.insert(0, str(Path(sys.argv[0]).with_suffix(".args")))
        words = [word for file in files if Path(file).is_file() for word in Path(file).read_text().split()]
        values: dict[str, Any] = {}
        if tokens and tokens[0].endswith(FILE_SUFFIXES) and not self._get_positional_actions():
            values = _read(tokens.pop(0))
        return self._parse([*words, *tokens], values, return_remaining_strings)

    def parse_with_file(
        self, args: Sequence[str] | None = None, file_flag: str = "--config", return_remaining_strings: bool = False
    ) -> tuple[Any, ...]:
        """Parse `--config a.yaml --lang en`: values from the file, overridden by flags, in one call.

        Required fields may come from either. The flag may be repeated (later files override earlier ones) or left out.
        """
        files, tokens = _take_flag(file_flag, list(sys.argv[1:] if args is None else args))
        values: dict[str, Any] = {}
        for file in files:
            values.update(_read(file))
        return self._parse(tokens, values, return_remaining_strings)

    def _parse(self, tokens: list[str], values: dict[str, Any], return_remaining: bool) -> tuple[Any, ...]:
        self._check_keys(values)
        required = [action for action in self._actions if action.required and action.dest in values]
        for action in required:  # argparse requires them on the command line; here the file has them
            action.required = False
        try:
            namespace, remaining = self.parse_known_args(tokens, argparse.Namespace(**self._converted(values)))
        finally:
            for action in required:
                action.required = True
        found = vars(namespace)
        outputs: list[Any] = []
        for one in self.dataclass_types:
            inputs = {name: found.pop(name) for name in self._names(one) if name in found}
            defaults = {field.name: _default(field) for field in _init_fields(one)}
            # Only what differs from the defaults is passed on, so that a dataclass can tell what was set.
            outputs.append(
                one(**{name: value for name, value in inputs.items() if not _same(value, defaults.get(name))})
            )
        if found:
            outputs.append(namespace)
        if return_remaining:
            return (*outputs, remaining)
        if remaining:
            raise ValueError(
                f"Some specified arguments are not used by the HfArgumentParser: {_without_values(remaining)}"
                f"{self._hint(remaining)}"
            )
        return tuple(outputs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; an unknown flag is named without its value."""
        namespace, remaining = self.parse_known_args(args, namespace)
        if remaining:
            self.error(f"unrecognized arguments: {' '.join(_without_values(remaining))}{self._hint(remaining)}")
        return namespace

    def error(self, message: str) -> NoReturn:
        """As in argparse: print usage (short) and leave with status 2."""
        # argparse repeats `--flag=value` whole where an abbreviation fits several flags; the value may be a secret.
        message = re.sub(r"^(ambiguous option: [^\s=]+)=.*( could match)", r"\1\2", message, flags=re.DOTALL)
        self.exit(2, f"{self.prog}: error: {message}\nSee `{self.prog} --help`.\n")

    # Dicts and files.

    def parse_dict(self, args: dict[str, Any], allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """One instance of each dataclass from a dict; texts become numbers, booleans and enums by the field's type.

        Raises:
            ValueError: no dataclass has some of the keys (unless `allow_extra_keys`), or a value is of the wrong type.
        """
        if not allow_extra_keys:
            self._check_keys(args)
        values = self._converted(args)
        return tuple(
            one(**{name: values[name] for name in self._names(one) if name in values}) for one in self.dataclass_types
        )

    def parse_json_file(self, json_file: str | os.PathLike[str], allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """`parse_dict` of a JSON file."""
        return self.parse_dict(_read(json_file, ".json"), allow_extra_keys)

    def parse_yaml_file(self, yaml_file: str | os.PathLike[str], allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """`parse_dict` of a YAML file."""
        return self.parse_dict(_read(yaml_file, ".yaml"), allow_extra_keys)

    # Small parts.

    def _names(self, dataclass_type: Any) -> Iterator[str]:
        left_out = self._left_out[dataclass_type]
        yield from (field.name for field in _init_fields(dataclass_type) if field.name not in left_out)
        yield from getattr(dataclass_type, "_hidden_arguments", ())

    def _check_keys(self, values: dict[str, Any]) -> None:
        known = {name for one in self.dataclass_types for name in self._names(one)} | {a.dest for a in self._actions}
        extra = sorted(str(key) for key in values if key not in known)
        if extra:
            near = "".join(_closest(key, known) for key in extra)
            raise ValueError(f"Some keys are not used by the HfArgumentParser: {extra}{near}")

    def _converted(self, values: dict[str, Any]) -> dict[str, Any]:
        result = dict(values)
        for one, hints in self._hints.items():
            for field in _init_fields(one):
                if field.name in result and field.name not in self._left_out[one]:
                    try:
                        result[field.name] = convert(
                            result[field.name], hints[field.name], isinstance(_default(field), Enum)
                        )
                    except (TypeError, ValueError) as error:
                        raise ValueError(f"{field.name}: {error}") from None
        return result

    def _take_dotted(self, tokens: list[str]) -> tuple[list[tuple[str, list[str], Any]], list[str]]:
        """Split `--name.key value` and `--name.key=value` from the other words."""
        dotted: list[tuple[str, list[str], Any]] = []
        rest: list[str] = []
        words = iter(enumerate(tokens))
        for index, token in words:
            flag, equals, text = token.partition("=")
            name, *keys = flag.removeprefix("--").split(".")
            name = name.replace("-", "_")
            if not (token.startswith("--") and keys and name in self._dict_hints):
                rest.append(token)
                continue
            if not equals:
                following = tokens[index + 1] if index + 1 < len(tokens) else "--"
                if following.startswith("--"):
                    text = "true"  # a key without a value is a switch
                else:
                    text = next(words)[1]
            dotted.append((name, keys, parse_literal(text)))
        return dotted, rest

    def _with_key(self, name: str, current: Any, keys: list[str], value: Any) -> dict[str, Any]:
        """A copy of the dict `current` with `value` at the nested `keys`."""
        if isinstance(current, str) and current.endswith(".json"):
            current = _read(current)
        if dataclasses.is_dataclass(current):
            current = {field.name: getattr(current, field.name) for field in _init_fields(type(current))}
        if current and not isinstance(current, dict):
            self.error(f"--{name}.{'.'.join(keys)} changes one key, but --{name} is {current!r}, which is no dict")
        result = copy.deepcopy(current or {})
        inner = result
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                self.error(f"--{name}.{'.'.join(keys)}: {key!r} holds {inner!r}, which is no dict")
        inner[keys[-1]] = value
        return dict(result)

    def _hint(self, remaining: list[str]) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings]
        return "".join(_closest(word.partition("=")[0], flags) for word in remaining if word.startswith("-"))


class _Reading:
    """How the words of a flag become the value of a field.

    Several words are one list; `['a', 'b']` in one word is one as well (what `str(list)` writes). Where the annotation
    allows text, too, a single word stays text.
    """

    def __init__(self, hint: Any, enum_members: bool, choices: Any = None) -> None:
        self.hint, self.enum_members = hint, enum_members
        self.choices = choices  # of the field's metadata; an Enum or a Literal checks itself
        self.takes_words = accepts_sequence(hint)

    def read(self, text: Any) -> Any:
        try:
            return convert(text, self.hint, self.enum_members)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling per flag, the default where it says something, and a usage line with the required flags only."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        shown = [action for action in actions if action.required or (action.nargs == 0 and action.dest == "help")]
        super().add_usage(usage, shown, [], prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        shown = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")] or action.option_strings[:1]
        return f"{', '.join(shown)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def add_argument(self, action: argparse.Action) -> None:
        if not hasattr(action, "is_complement"):  # it is listed with the flag that it switches off
            super().add_argument(action)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        reading = getattr(action, "reading", None)
        if reading is None or action.metavar is not None or (action.choices and len(list(action.choices)) <= 8):
            return super()._metavar_formatter(action, default_metavar)
        return lambda number: (describe(reading.hint),) * number

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = f"{action.help} Off: {action.off}." if hasattr(action, "off") else action.help
        if text is None or action.default in (None, "", argparse.SUPPRESS) or action.default in ([], {}):
            return text
        return text if "%(default)" in text else f"{text} (default: %(default)s)"


def _without_values(words: list[str]) -> list[str]:
    """The flags among words that no flag took, and words before the first of them; a value may be a secret.

    >>> _without_values(["more", "--api_key=hidden", "--password", "hidden"])
    ['more', '--api_key', '--password']
    """
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first] + [word.partition("=")[0] for word in words[first:] if re.match("--?[A-Za-z]", word)]


def _init_fields(dataclass_type: Any) -> list[dataclasses.Field[Any]]:
    """The arguments of the constructor: the fields, and what is only passed to `__post_init__` (InitVar)."""
    marked = vars(dataclasses)["_FIELD_CLASSVAR"]
    found = dataclass_type.__dataclass_fields__.values()
    return [field for field in found if field.init and field._field_type is not marked]


def _is_ours(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("extension"))


def _flags(name: str) -> list[str]:
    return [f"--{name}", f"--{name.replace('_', '-')}"] if "_" in name else [f"--{name}"]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))


def _first_line(owner: type) -> str:
    written = (owner.__doc__ or "").strip().splitlines()
    generated = not written or written[0].startswith(f"{owner.__name__}(")  # what @dataclass writes
    # Without its full stop: argparse ends a title with a colon.
    return owner.__name__ if generated else f"{owner.__name__}: {written[0].removesuffix('.')}"


def _take_flag(flag: str, tokens: list[str]) -> tuple[list[str], list[str]]:
    """The values of `flag` in `tokens`, and the other words."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(flag, dest="found", action="append", default=[])
    namespace, rest = finder.parse_known_args(tokens)
    return list(namespace.found), rest


def _closest(word: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def _read(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """A JSON or YAML file as a dict; `kind` overrides the suffix. ValueError names a file that cannot be parsed."""
    text = Path(path).read_text(encoding="utf-8")
    if (kind or Path(path).suffix) == ".json":
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{os.fspath(path)} is not valid JSON: {error}") from None
    else:
        try:
            import yaml
        except ModuleNotFoundError:
            raise ImportError(f"Reading {os.fspath(path)} needs PyYAML. Run: pip install 'trainwright[yaml]'") from None
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{os.fspath(path)} is not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)} holds a {type(value).__name__}; names and values are needed.")
    return value
