"""Arguments with the defaults of the installed `transformers`.

Owns: `TrainingArguments` and `Seq2SeqTrainingArguments` of this module, made on first use: ours, with the defaults of
the installed generation where they differ (`report_to` is "none" since 5, for one). Leaves to others: the fields and
what they mean (`args/`); older and newer names, which are accepted in every generation.
They are attributes of this module, so that a pickle of them can be loaded in another process.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
import warnings
from typing import Any

from trainwright.args.seq2seq import Seq2SeqTrainingArguments as _Seq2Seq
from trainwright.args.training import TrainingArguments as _Training
from trainwright.interop.optional import installed_version

# The first release that evaluates at a last step between two evaluations (`eval_strategy="steps"`). Observed: 4.55.4,
# 5.0.0, 5.2.0 and 5.3.0 do not, 5.4.0 and later ones do.
_EVALUATES_LAST_STEP = (5, 4)

_ORIGINALS = {
    "TrainingArguments": "transformers.training_args",
    "Seq2SeqTrainingArguments": "transformers.training_args_seq2seq",
}
originals: dict[str, type] = {}  # the classes of the reference, stored by `dropin` before it replaces them


def _original(name: str) -> type:
    if name not in originals:
        originals[name] = getattr(importlib.import_module(_ORIGINALS[name]), name)
    return originals[name]


def differing_defaults(ours: type, theirs: type) -> dict[str, dataclasses.Field[Any]]:
    """Their fields that ours have with another default. Reads the two lists of fields, calls nothing."""
    known = {field.name: field for field in dataclasses.fields(ours) if field.init}
    return {
        field.name: field
        for field in dataclasses.fields(theirs)
        if field.name in known and _default(field) != _default(known[field.name])
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


class _ForOtherPrograms:
    """Base of the arguments of programs written for `transformers`."""

    # As in the installed generation: programs count the evaluations in the log.
    _evaluates_last_step = (installed_version("transformers") or _EVALUATES_LAST_STEP) >= _EVALUATES_LAST_STEP
    _is_written_for_us = False  # a subclass's field `packing` is not ours (`BatchArguments.packs`)

    def __init_subclass__(cls, **options: Any) -> None:
        """Warn of fields that have the name of an extension of ours: they take effect as such."""
        super().__init_subclass__(**options)
        if cls.__module__ == __name__:
            return
        ours = {field.name for field in dataclasses.fields(_Seq2Seq) if field.metadata["extension"]} - {"packing"}
        if names := sorted(ours & set(inspect.get_annotations(cls))):
            warnings.warn(
                f"{cls.__qualname__} defines {', '.join(names)}, which is an argument of trainwright and takes effect "
                "as such (docs/arguments.md). If it means something else here, give it another name.",
                RuntimeWarning,
                stacklevel=2,
            )


def _with_defaults_of(theirs: type, bases: tuple[type, ...]) -> type:
    ours = bases[-1]
    hints, known = typing.get_type_hints(ours), {field.name: field for field in dataclasses.fields(ours)}
    namespace: dict[str, Any] = {"__module__": __name__, "__doc__": ours.__doc__, "__annotations__": {}}
    for name, field in differing_defaults(ours, theirs).items():
        namespace["__annotations__"][name] = hints[name] | None if _default(field) is None else hints[name]
        namespace[name] = dataclasses.field(
            default=field.default, default_factory=field.default_factory, metadata=known[name].metadata
        )
    made: type = dataclasses.dataclass(type(ours)(ours.__name__, bases, namespace))
    return made


def __getattr__(name: str) -> Any:
    if name == "TrainingArguments":
        made = _with_defaults_of(_original(name), (_ForOtherPrograms, _Training))
    elif name == "Seq2SeqTrainingArguments":
        bases = (__getattr__("TrainingArguments"), _Seq2Seq)
        made = _with_defaults_of(_original(name), bases)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, made)
