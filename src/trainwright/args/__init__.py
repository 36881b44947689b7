"""Owns: the arguments, one dataclass per topic, joined by `TrainingArguments`.

Leaves to others: acting on them. Importing this package and constructing arguments loads no heavy package; torch is
loaded when the device is first read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainwright.args.seq2seq import Seq2SeqTrainingArguments
    from trainwright.args.training import TrainingArguments

__all__ = ["Seq2SeqTrainingArguments", "TrainingArguments"]


def __getattr__(name: str) -> Any:
    if name == "TrainingArguments":
        from trainwright.args.training import TrainingArguments

        return TrainingArguments
    if name == "Seq2SeqTrainingArguments":
        from trainwright.args.seq2seq import Seq2SeqTrainingArguments

        return Seq2SeqTrainingArguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
