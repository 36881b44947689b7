"""Older names of the arguments of `Trainer(...)` and `train(...)`.

Owns: translating them, with one warning that points at the caller. Leaves to others: names of TrainingArguments
(`args/renamed.py`). Source: seeds 003 and 004 (`tokenizer=`, `callback=[...]`, `model_path=`).
"""

from __future__ import annotations

import warnings
from typing import Any

from trainwright.names import closest

TRAINER = {"tokenizer": "processing_class", "callback": "callbacks"}
TRAIN = {"model_path": "resume_from_checkpoint"}


def translated(
    older: dict[str, Any], rows: dict[str, str], function: str, known: list[str], stacklevel: int = 3
) -> dict[str, Any]:
    """`older` under today's names. An unknown name is a TypeError that suggests the nearest of `known`."""
    values: dict[str, Any] = {}
    for name, value in older.items():
        if name not in rows:
            raise TypeError(f"{function}() got an unexpected argument {name!r}.{closest(name, [*known, *rows])}")
        warnings.warn(f"{function}({name}=...) is now called {rows[name]}=.", FutureWarning, stacklevel=stacklevel)
        values[rows[name]] = value
    return values
