"""Settings of a file as the arguments of a task, or every mistake in them, before anything is loaded.

Owns: unknown sections and options, values of the wrong kind, what is done where the file does not say it. Leaves to
others: reading (`reading.py`), ranges and contradictions (each dataclass), data and models (`tasks/`).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Any

from trainwright.args.training import TrainingArguments
from trainwright.argtypes import convert, members
from trainwright.config_file.reading import ConfigFileError, Settings
from trainwright.config_file.sections import NOT_TRAINING, SECTIONS, TASKS, Option, Task, options_of
from trainwright.names import closest
from trainwright.redact import is_secret
from trainwright.tasks.arguments import DataArguments, TrainedModelArguments
from trainwright.tasks.sources import folder_parts

MAX_SHOWN = 20  # options in a message; the rest are in the documents


@dataclass
class Job:
    """What a file asks for, checked: the name of a task and its arguments."""

    task: str
    model: TrainedModelArguments
    data: DataArguments
    training: TrainingArguments

    def run(self) -> dict[str, float]:
        """Do it; returns all metrics. Errors as the task's: DataError where data or model do not fit."""
        module = importlib.import_module(f"trainwright.tasks.{self.task}")
        return module.run(self.model, self.data, self.training)  # type: ignore[no-any-return]


def check(settings: Settings) -> Job:
    """The job that `settings` ask for. ConfigFileError with a line for each mistake."""
    values = settings.values
    unknown = [str(name) for name in values if name not in SECTIONS]
    problems = [_unknown(settings, name, values.get(name), SECTIONS, "section") for name in unknown]
    problems += [_missing(settings, name) for name in ("task", "model", "data") if values.get(name) is None]
    task = values.get("task")
    if str(task) in NOT_TRAINING:
        problems.append(f"{settings.place('task')}: task={task!r} {NOT_TRAINING[str(task)]}")
    elif task is not None and str(task) not in TASKS:
        near = closest(str(task), TASKS)
        problems.append(f"{settings.place('task')}: task={task!r} is none of {', '.join(TASKS)}.{near}")
    for name in ("model", "data", "training", "lora"):
        if values.get(name) is not None and not isinstance(values[name], dict):
            problems.append(f"{settings.place(name)}: {name}={_shown(name, values[name])} is no section of options.")
    if problems:
        raise ConfigFileError("\n".join(problems))

    kinds = TASKS[str(task)]
    given = {name: dict(values.get(name) or {}) for name in ("model", "data", "training")}
    _fill_in(given["training"], given["data"], kinds)
    if "lora" in values:  # also an empty one, which takes the defaults of peft
        problems += _lora_problems(settings, values["lora"] or {})
    classes = {"model": kinds.model, "data": kinds.data, "training": kinds.training}
    fields = {}
    for name, cls in classes.items():
        fields[name] = _fields_of(settings, name, cls, given[name], problems)
    if problems:
        raise ConfigFileError("\n".join(problems))

    if "lora" in values:
        fields["model"]["lora"] = dict(values["lora"] or {})
    made = {name: _make(settings, name, cls, fields[name], problems) for name, cls in classes.items()}
    if problems:
        raise ConfigFileError("\n".join(problems))
    return Job(str(task), made["model"], made["data"], made["training"])


def _fill_in(training: dict[str, Any], data: dict[str, Any], kinds: Task) -> None:
    """What the file does not say: train; evaluate and predict where there are data for it; resume what was stopped."""
    parts = folder_parts(str(data.get("name"))) if kinds.reads_folders else {}
    training.setdefault("do_train", True)
    if data.get("validation_file") or data.get("validation_split_percentage") or "validation" in parts:
        training.setdefault("do_eval", True)
    if data.get("test_file") or "test" in parts:
        training.setdefault("do_predict", True)
    training.setdefault("resume_from_checkpoint", "auto")


def _fields_of(
    settings: Settings, section: str, cls: type[Any], given: dict[str, Any], problems: list[str]
) -> dict[str, Any]:
    """The fields of `cls` with the values given; each that is unknown or of the wrong kind is added to `problems`."""
    options, fields = options_of(section, cls), {}
    for name, value in given.items():
        dotted = f"{section}.{name}"
        option = options.get(name)
        if option is not None:
            try:
                fields[option.field] = _converted(value, option)
            except (TypeError, ValueError):
                problems.append(
                    f"{settings.place(dotted)}: {dotted}={_shown(name, value)} is not allowed: it takes "
                    f"{allowed(option.hint)}.{_near_value(value, option.hint)}"
                )
        elif section == "training":
            fields[name] = value  # older names are translated by the arguments, which also refuse what they do not know
        else:
            problems.append(_unknown(settings, dotted, value, options, f"option of {section}"))
    return fields


def _make(settings: Settings, section: str, cls: type[Any], fields: dict[str, Any], problems: list[str]) -> Any:
    try:
        return cls(**fields)
    except (TypeError, ValueError, OSError, ImportError) as error:
        text = _in_words_of_the_file(" ".join(str(error).split()), section, cls)
        named = {option.field: name for name, option in options_of(section, cls).items()}
        place, about = settings.place(section), f"{section}: "
        for field in fields:  # the one that the message begins with, or that it quotes as unknown
            dotted = f"{section}.{named.get(field, field)}"
            if text.startswith((f"{field}=", f"{field}:")):
                place, about, text = settings.place(dotted), "", f"{dotted}{text[len(field) :]}"
                break
            if f"no argument {field!r}" in text:
                place, about = settings.place(dotted), f"{dotted}: "
        problems.append(f"{place}: {about}{text}")
    return None


def in_words_of_the_file(message: str, job: Job) -> str:
    """`message` of a task with its flags (`--text_column`) named as in the file (`data.text_column`)."""
    for section, made in (("model", job.model), ("data", job.data), ("training", job.training)):
        message = _in_words_of_the_file(message, section, type(made))
    return message


def wrong_setting(error: ValueError, job: Job) -> str | None:
    """The message of `error` where it begins with an argument (`max_steps=0 ...`), named as in the file; else None.

    Some settings can only be compared with the data and the model, such as the metric that says which step is best.
    """
    text = " ".join(str(error).split())
    argument, equals, _ = text.partition("=")
    return f"training.{text}" if equals and argument in options_of("training", type(job.training)) else None


def _in_words_of_the_file(message: str, section: str, cls: type[Any]) -> str:
    names = {option.field: name for name, option in options_of(section, cls).items()}

    def renamed(match: re.Match[str]) -> str:
        dashes, field = match.groups()
        is_short = names.get(field, field) != field
        return f"{section}.{names[field]}" if field in names and (dashes or is_short) else match[0]

    return re.sub(r"(--)?\b([a-z]\w+)\b", renamed, message)


def _unknown(settings: Settings, dotted: str, value: Any, known: Any, what: str) -> str:
    names = list(known)
    near = closest(dotted.rpartition(".")[2], names)
    if what == "section":
        from_section = next((one for one in ("training", "model", "data") if _has(settings, one, dotted)), None)
        near = f" Did you mean '{from_section}.{dotted}'?" if from_section else near
    shown = ", ".join(names[:MAX_SHOWN]) + (" ..." if len(names) > MAX_SHOWN else "")
    return (
        f"{settings.place(dotted)}: {dotted}={_shown(dotted, value)}: there is no such {what}; there are {shown}.{near}"
    )


def _has(settings: Settings, section: str, name: str) -> bool:
    task = TASKS.get(str(settings.values.get("task")))
    classes = {
        "training": TrainingArguments,
        "model": TrainedModelArguments,
        "data": task.data if task else DataArguments,
    }
    return name.replace("-", "_") in options_of(section, classes[section])


def _missing(settings: Settings, name: str) -> str:
    what = {
        "task": f"task, one of {', '.join(TASKS)}",
        "model": "model, with path (a directory or hub name) or config (the values of a new one)",
        "data": "data, with train_file (csv, tsv, json, jsonl, txt or parquet) or name (of the hub, or a directory)",
    }[name]
    return f"{settings.path} has no {what}. `trainwright init` writes an example."


def _lora_problems(settings: Settings, lora: dict[str, Any]) -> list[str]:
    if importlib.util.find_spec("peft") is None:
        return [f"{settings.place('lora')}: lora: training an adapter needs peft. Run: pip install 'trainwright[peft]'"]
    from peft import LoraConfig

    known = [name for name in inspect.signature(LoraConfig).parameters if name not in ("peft_type", "auto_mapping")]
    return [
        _unknown(settings, f"lora.{name}", value, known, "option of lora (peft.LoraConfig)")
        for name, value in lora.items()
        if name not in known
    ]


def _converted(value: Any, option: Option) -> Any:
    if isinstance(value, bool) and str in members(option.hint) and bool not in members(option.hint):
        value = str(value).lower()  # resume_from_checkpoint: false
    found = convert(value, option.hint)
    if not fits(found, option.hint):
        raise ValueError
    return found


def fits(value: Any, hint: Any) -> bool:
    """Whether `value`, as `convert` leaves it, is one of those that the annotation `hint` allows.

    >>> fits(None, int), fits(True, int), fits([1], list[str] | None), fits(2, float | None)
    (False, False, False, True)
    """
    if hint in (Any, object):
        return True
    if value is None:
        return type(None) in typing.get_args(hint)
    return any(_is_one(value, option) for option in members(hint))


def _is_one(value: Any, option: Any) -> bool:
    kind = typing.get_origin(option) or option
    if option in (Any, object):
        return True
    if kind is typing.Literal:
        return value in typing.get_args(option)
    if kind is list:
        return isinstance(value, list) and all(fits(item, one) for one in typing.get_args(option) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, (dict, kind))  # type: ignore[arg-type]
    return isinstance(value, kind)


def allowed(hint: Any) -> str:
    """What an option with this annotation takes, in words.

    >>> allowed(float | None), allowed(bool), allowed(list[str] | str | None)
    ('a number or null', 'true or false', 'a list or text')
    """
    words: list[str] = []
    for option in members(hint):
        kind = typing.get_origin(option) or option
        if kind is typing.Literal:
            word = ", ".join(map(str, typing.get_args(option)))
        elif isinstance(kind, type) and issubclass(kind, Enum):
            word = ", ".join(str(member.value) for member in kind)
        elif dataclasses.is_dataclass(kind):
            continue  # written as a mapping
        else:
            word = _WORDS.get(kind, "any value")
        words.append(word)
    if str in members(hint) and any("," in word for word in words):
        words.remove("text")  # one of these names
    if type(None) in typing.get_args(hint):
        words.append("null")
    return " or ".join(dict.fromkeys(words))


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def _near_value(value: Any, hint: Any) -> str:
    kinds = [one for one in members(hint) if isinstance(one, type) and issubclass(one, Enum)]
    return closest(str(value), [member.value for kind in kinds for member in kind])


def _shown(name: str, value: Any) -> str:
    """A value in a message, as the file would have it; a secret is not shown."""
    if is_secret(name.rpartition(".")[2]):
        return "(hidden)"
    text = json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
