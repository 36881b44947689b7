"""Output of this package's log messages, and their level.

Owns: the level set by arguments, and a handler for programs that configure no logging. Both are set up by the first
Trainer: importing the package configures nothing. Leaves to others: which level a process has (`args/`), and following
`transformers` under the drop-in (`compat/dropin.py`). Standard library only.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments

LIBRARY = "trainwright"
ERASE_DRAWN = "\r\x1b[J"  # the line of the cursor, where tqdm leaves it, and the bars below it
library = LIBRARY  # whose level applies: that of `transformers` under the drop-in


def can_erase(stream: TextIO | None) -> bool:
    """Whether `stream` is a terminal that obeys `ERASE_DRAWN`."""
    return stream is not None and os.environ.get("TERM") != "dumb" and stream.isatty()


def library_logger() -> logging.Logger:
    """The logger whose level decides what is shown."""
    return logging.getLogger(library)


def show_messages(level: int | None) -> None:
    """Show messages from `level` on; None leaves the level unchanged ("passive").

    Without another handler they are written to stderr, above progress bars. As soon as a program has a handler, on the
    root logger (`logging.basicConfig`) or on this package's, only that one shows them.
    """
    if level is not None:
        library_logger().setLevel(level)
    logger = logging.getLogger(LIBRARY)
    if not any(isinstance(handler, _LastResort) for handler in logger.handlers):
        logger.addHandler(_LastResort())


def show_messages_of(args: TrainingArguments) -> None:
    """`show_messages` from the level that this process has by `args`."""
    is_left_alone = args.should_log and args.log_level == "passive"
    show_messages(None if is_left_alone else args.get_process_log_level())


class _LastResort(logging.Handler):
    """Writes a record to stderr unless another handler shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(f"[{LIBRARY}] %(levelname)s: %(message)s"))
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if self._is_shown_elsewhere(record.levelno):
            return
        try:
            self._write(self.format(record))
        except Exception:
            self.handleError(record)

    def _is_shown_elsewhere(self, level: int) -> bool:
        logger: logging.Logger | None = logging.getLogger(LIBRARY)
        while logger is not None:
            for handler in logger.handlers:
                if handler is not self and not isinstance(handler, logging.NullHandler) and level >= handler.level:
                    return True
            logger = logger.parent if logger.propagate else None
        return False

    def _write(self, text: str) -> None:
        if sys.stderr is None:  # pythonw
            return
        bars = sys.modules.get("tqdm.std")
        # A forked process has copies of the bars, and must not draw them.
        if bars is not None and bars.tqdm._instances and os.getpid() == self._process:
            bars.tqdm.write(text, file=sys.stderr)
            return
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
