"""Errors that a user of a task script can fix: wrong data, missing packages.

Owns: `DataError`, the packages that tasks need with the extra of each, and how a script ends with such an error: one
line, no traceback. Leaves to others: raising it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from trainwright.interop.optional import MissingExtra, require

# Top-level module -> (what a task needs it for, the extra that brings it).
_PACKAGES = {
    "seqeval": ("Scoring entities", "metrics"),
    "sacrebleu": ("BLEU", "metrics"),
    "rouge_score": ("ROUGE", "metrics"),
    "jiwer": ("Counting wrong words", "metrics"),
    "PIL": ("Reading images", "images"),
    "scipy": ("Changing the sampling rate", "audio"),
    "soundfile": ("Reading sound", "audio"),
    "datasets": ("Reading training data", "datasets"),
    "sklearn": ("Loading the handwritten digits", "digits"),
    "transformers": ("The language model of this example", "transformers"),
    "matplotlib": ("Drawing the loss curve", "plot"),
}


class DataError(ValueError):
    """The data, the model or an argument is not what a task needs; the message names the place and a remedy."""


def package(module: str) -> ModuleType:
    """Import `module` (such as "seqeval.metrics"), or raise MissingExtra with the pip command of its extra.

    A script that will need one calls this before it reads data, so that `--plan` notices, and no training is wasted.
    """
    needed_for, extra = _PACKAGES[module.partition(".")[0]]
    return require(module, needed_for, extra=extra)


def message_of(error: Exception) -> str:
    """The message of `error` in one line, also where a process of a DataLoader raised it.

    torch makes the whole traceback of that process the message; its last line is ours.
    """
    text = str(error)
    return text.rstrip().rpartition("\n")[2].partition(": ")[2] if text.startswith("Caught ") else text


def as_script(main: Callable[[list[str]], Any]) -> None:
    """Run `main` on the command line. An error that the user can fix is one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except (DataError, MissingExtra) as error:
        print(f"{os.path.basename(sys.argv[0])}: {message_of(error)}", file=sys.stderr)
        raise SystemExit(2) from None
