"""Owns: `DataError`, and how a script ends with it: one line, no traceback. Leaves to others: raising it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


class DataError(ValueError):
    """The data, the model or an argument is not what a task needs; the message names place and cure."""


def as_script(main: Callable[[list[str]], Any]) -> None:
    """Run `main` on the command line. What the user can mend is one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except DataError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
