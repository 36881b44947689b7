"""`option()`: a dataclass field whose meaning is written down once, in its help.

Owns: how a field carries its documentation. Leaves to others: printing it (`argparser.py`, the API page).
Annotations of the fields keep `str` second, as in `list[str] | str | None`: older command-line parsers expect unions in
that order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    choices: Iterable[str] | None = None,
    extension: bool = False,
    init: bool = True,
    repr: bool = True,
    compare: bool = True,
) -> Any:
    """A dataclass field with `help` (unit, consequence; %% for a percent sign).

    `choices`: the texts that are allowed, for `--help` and shell completion; the dataclass itself checks its value.
    `extension`: no documented implementation has it, so a script may define a field of that name (`argparser.py`).
    """
    metadata: dict[str, Any] = {"help": help, "extension": extension}
    if choices is not None:
        metadata["choices"] = list(choices)
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata, init=init, repr=repr, compare=compare)
    return dataclasses.field(default=default, metadata=metadata, init=init, repr=repr, compare=compare)
