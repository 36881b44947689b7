"""Leaving everything as it was.

Owns: putting back what a look at a run moves: attributes, random generators, training mode, log lines that are
collected.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from trainwright.data import collator_rng
from trainwright.seeding import RngState, accelerators


@contextlib.contextmanager
def unchanged(model: nn.Module, owner: object, collator: Any) -> Iterator[None]:
    """Within, attributes of `owner` and `collator`, the mode of each part of `model`, random generators and those of
    the collator may change. Attributes are the same objects afterwards: what changes inside them stays changed.
    """
    attributes = [(one, dict(vars(one))) for one in (owner, collator) if hasattr(one, "__dict__")]
    modes = [(module, module.training) for module in model.modules()]
    generators, of_collator = RngState.capture(accelerators()), collator_rng.states(collator)
    try:
        yield
    finally:
        for one, before in attributes:
            vars(one).clear()
            vars(one).update(before)
        for module, mode in modes:
            module.training = mode
        generators.restore()
        collator_rng.restore(collator, of_collator)


class Collected(logging.Handler):
    """Within, warnings of this library are collected in `messages`, each once, and shown nowhere."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._undo = contextlib.ExitStack()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.messages:
            self.messages.append(message)

    def __enter__(self) -> Collected:
        for name in ("trainwright", "transformers"):  # the latter while our classes replace its
            library = logging.getLogger(name)
            before = library.handlers, library.propagate
            library.handlers, library.propagate = [self], False
            self._undo.callback(self._put_back, library, *before)
        return self

    @staticmethod
    def _put_back(library: logging.Logger, handlers: list[logging.Handler], propagate: bool) -> None:
        library.handlers, library.propagate = handlers, propagate

    def __exit__(self, *error: object) -> None:
        self._undo.close()
