"""What a training warned of, in a process that has no output of pytest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any


def warned(action: Callable[[], Any]) -> list[str]:
    """The messages that trainwright logs as warnings or errors while `action` runs."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logging.getLogger("trainwright").addHandler(handler)
    try:
        action()
    finally:
        logging.getLogger("trainwright").removeHandler(handler)
    return messages
