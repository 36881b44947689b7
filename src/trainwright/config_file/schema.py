"""The JSON schema of a file of settings, for editors that complete and check while one types.

Owns: annotations as JSON schema. Leaves to others: the options (`sections.py`), checking a file (`check.py`, which also
knows ranges and contradictions).
"""

from __future__ import annotations

import dataclasses
import json
import typing
from enum import Enum
from typing import Any

from trainwright.args.renamed import RENAMED
from trainwright.argtypes import members
from trainwright.config_file.sections import TASKS, Option, options_of
from trainwright.tasks.arguments import PretrainingModelArguments

# Of peft.LoraConfig, the ones that are mostly set; others are allowed, since releases differ.
_LORA = {
    "r": {"type": "integer", "description": "Rank of the adapter."},
    "lora_alpha": {"type": "number", "description": "Its scale is lora_alpha / r."},
    "lora_dropout": {"type": "number", "description": "Share of its inputs that are dropped in training."},
    "target_modules": {
        "type": ["array", "string", "null"],
        "items": {"type": "string"},
        "description": "Names of the layers that get an adapter; all-linear: every linear one. null: by architecture.",
    },
    "modules_to_save": {
        "type": ["array", "null"],
        "items": {"type": "string"},
        "description": "Layers that are trained whole, such as a new head.",
    },
    "bias": {"enum": ["none", "all", "lora_only"], "description": "Which biases are trained."},
    "use_rslora": {"type": "boolean", "description": "Scale by lora_alpha / sqrt(r)."},
    "use_dora": {"type": "boolean", "description": "Train the length of each weight vector apart from its direction."},
    "fan_in_fan_out": {"type": "boolean", "description": "The layers store (in, out), as those of GPT-2 do."},
}
_KINDS: dict[Any, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def schema() -> dict[str, Any]:
    """The schema (draft 2020-12). The options of `data` and `training` are those of the task that the file names."""
    by_task = [
        {
            "if": {"properties": {"task": {"const": name}}, "required": ["task"]},
            "then": {
                "properties": {
                    "model": _section("model", task.model),
                    "data": _section("data", task.data),
                    "training": _section("training", task.training),
                    **({"lora": {"type": "null"}} if issubclass(task.model, PretrainingModelArguments) else {}),
                }
            },
        }
        for name, task in TASKS.items()
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "trainwright train",
        "type": "object",
        "properties": {
            "task": {
                "enum": list(TASKS),
                "description": " ".join(f"{name}: {task.help}." for name, task in TASKS.items()),
            },
            "model": {"type": "object", "description": "The model, and what prepares its inputs."},
            "data": {"type": "object", "description": "The data, and how they become samples."},
            "training": {"type": ["object", "null"], "description": "Any field of TrainingArguments."},
            "lora": {
                "type": ["object", "null"],
                "description": "Train a LoRA adapter alone: fields of peft.LoraConfig.",
                "properties": _LORA,
            },
        },
        "required": ["task", "model", "data"],
        "additionalProperties": False,
        "allOf": by_task,
    }


def as_text() -> str:
    """`schema` as indented JSON."""
    return json.dumps(schema(), indent=2)


def _section(name: str, cls: type[Any]) -> dict[str, Any]:
    properties = {option: _property(found) for option, found in options_of(name, cls).items()}
    if name == "training":
        properties |= {older: {"deprecated": True} for older in RENAMED if older not in properties}
    return {"type": ["object", "null"] if name == "training" else "object", "properties": properties,
            "additionalProperties": False}  # fmt: skip


def _property(option: Option) -> dict[str, Any]:
    result = {**_type_of(option.hint), "description": option.help}
    default = option.default.value if isinstance(option.default, Enum) else option.default
    if default is not dataclasses.MISSING and type(default) in (bool, int, float, str, list):
        result["default"] = default
    return result


def _type_of(hint: Any) -> dict[str, Any]:
    """An annotation as JSON schema; {} allows anything."""
    kinds: list[str] = []
    names: list[Any] = []
    result: dict[str, Any] = {}
    for option in members(hint):
        kind = typing.get_origin(option) or option
        if isinstance(kind, type) and issubclass(kind, Enum):
            names += [member.value for member in kind]
        elif dataclasses.is_dataclass(kind):
            kinds.append("object")
        elif kind in _KINDS:
            kinds.append(_KINDS[kind])
            if kind is list and typing.get_args(option) == (str,):
                result["items"] = {"type": "string"}
        else:
            return {}
    may_be_null = type(None) in typing.get_args(hint)
    if names:  # the text with them is one of them
        return {"enum": [*names, *([None] if may_be_null else [])]}
    kinds += ["null"] if may_be_null else []
    return {"type": kinds[0] if len(kinds) == 1 else kinds, **result}
