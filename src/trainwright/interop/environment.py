"""Read the environment variables that configure trackers.

Owns: turning a variable into a flag or one of a few words, with an error that names the variable. Leaves to others:
what each variable does (the tracker's own file). Stdlib only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from trainwright.names import closest

_YES = frozenset({"1", "true", "yes", "on", "y", "t"})
_NO = frozenset({"", "0", "false", "no", "off", "n", "f", "none"})


class EnvironmentValueError(ValueError):
    """An environment variable holds a value that it cannot have; the message lists the allowed ones."""


def env_flag(variable: str, default: bool = False) -> bool:
    """The variable as yes or no ("1", "TRUE", "off" ...), `default` where it is not set."""
    text = os.environ.get(variable)
    if text is None:
        return default
    if text.strip().lower() in _YES:
        return True
    if text.strip().lower() in _NO:
        return False
    raise EnvironmentValueError(f"The environment variable {variable}={text!r} must be TRUE or FALSE (or 1 or 0).")


def env_choice(variable: str, allowed: Sequence[str], default: str) -> str:
    """The variable in lower case when it is one of `allowed`, `default` where it is not set."""
    text = os.environ.get(variable, default).strip().lower()
    if text in allowed:
        return text
    raise EnvironmentValueError(
        f"The environment variable {variable}={text!r} must be one of {list(allowed)}.{closest(text, allowed)}"
    )
