"""Arguments as other releases and the reference spell them: older names, and a `TrainingArguments` of `transformers`.

Owns: translating the older names of `Trainer(...)` and `train(...)`, with one warning that points at the caller;
building our arguments from an object of another implementation. Leaves to others: older names of TrainingArguments
(`args/renamed.py`), what the fields mean (`args/`). Source: seeds 003 and 004 (`tokenizer=`, `callback=[...]`,
`model_path=`).
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any

from trainwright.args.training import TrainingArguments
from trainwright.names import closest

logger = logging.getLogger(__name__)

TRAINER = {"tokenizer": "processing_class", "callback": "callbacks"}
TRAIN = {"model_path": "resume_from_checkpoint"}
# Derived from other fields in the reference's classes; ours derive them themselves.
_DERIVED = ("accelerator_config", "fsdp_config", "deepspeed_plugin", "distributed_state")


def names_of(function: Callable[..., Any]) -> list[str]:
    """The current names of its arguments."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "older")]


def translated(
    older: dict[str, Any], rows: dict[str, str], function: str, known: list[str], stacklevel: int = 3
) -> dict[str, Any]:
    """`older` under the current names. An unknown name is a TypeError that suggests the nearest of `known`."""
    values: dict[str, Any] = {}
    for name, value in older.items():
        if name not in rows:
            raise TypeError(f"{function}() got an unexpected argument {name!r}.{closest(name, [*known, *rows])}")
        warnings.warn(f"{function}({name}=...) is now called {rows[name]}=.", FutureWarning, stacklevel=stacklevel)
        values[rows[name]] = value
    return values


def adopted(args: Any) -> Any:
    """`args` itself, or ours with the same values where they are a dataclass of another implementation.

    Fields that a subclass added become attributes, except where one of our extensions has that name: it means something
    else there (TRL packs itself where its `packing` is set), so ours keeps its default. Raises TypeError naming the
    field that cannot be converted.
    """
    if isinstance(args, TrainingArguments) or not _is_foreign(args):
        return args
    from trainwright.args.seq2seq import Seq2SeqTrainingArguments

    ours = Seq2SeqTrainingArguments if hasattr(args, "predict_with_generate") else TrainingArguments
    known = {field.name: field for field in dataclasses.fields(ours) if field.init}
    given, extra, namesakes = {}, {}, []
    for field in dataclasses.fields(args):
        value = _plain(getattr(args, field.name))
        if field.name in known and known[field.name].metadata["extension"]:
            if value != known[field.name].default:
                namesakes.append(f"{field.name}={value!r}")
        elif field.name in known and field.name not in _DERIVED:
            given[field.name] = value
        elif field.name not in known and field.init:
            extra[field.name] = value
    for name in ("accelerator_config", "fsdp_config"):
        config: Any = getattr(args, name, None)
        given[name] = config.to_dict() if hasattr(config, "to_dict") else config
    if not given.get("fsdp"):
        given["fsdp_config"] = None  # theirs is set even where FSDP is off
    try:
        made = ours(**{name: value for name, value in given.items() if not _is_unset(ours, name, value)})
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"args is a {type(args).__module__}.{type(args).__qualname__}, and it cannot be converted: {error} "
            "Build it from trainwright.TrainingArguments, or call trainwright.dropin.install() before it is imported."
        ) from error
    for name, value in extra.items():
        setattr(made, name, value)
    if namesakes:
        logger.warning(
            "%s of %s.%s was not converted: an argument of that name means something else in trainwright. To set "
            "trainwright's, build the arguments from trainwright.TrainingArguments.",
            ", ".join(namesakes),
            type(args).__module__,
            type(args).__qualname__,
        )
    return made


def _is_foreign(args: Any) -> bool:
    return dataclasses.is_dataclass(args) and hasattr(args, "per_device_train_batch_size")


def _plain(value: Any) -> Any:
    """Enums of the reference by value: ours are found by it."""
    if isinstance(value, Enum):
        return value.value
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _is_unset(ours: type, name: str, value: Any) -> bool:
    default = next(field for field in dataclasses.fields(ours) if field.name == name)  # type: ignore[arg-type]
    return value is None and default.default is not None
