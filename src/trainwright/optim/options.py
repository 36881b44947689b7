"""The text of `optim_args` ("momentum=0.9,nesterov=True") as typed constructor arguments.

Owns: splitting, typing and checking the text. Leaves to others: what the arguments do (`*_family.py`).
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from trainwright.names import closest

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# Set through other arguments, so that each has one place.
_ELSEWHERE = {"lr": "learning_rate", "weight_decay": "weight_decay", "params": "the model", "model": "the model"}


def parse_optim_args(text: str | None) -> dict[str, str]:
    """Split "a=1, betas=(0.9,0.95)" into names and texts; commas inside brackets do not split.

    >>> parse_optim_args("a=1, betas=(0.9,0.95)")
    {'a': '1', 'betas': '(0.9,0.95)'}
    """
    options: dict[str, str] = {}
    for item in re.split(r",(?![^(\[]*[)\]])", text or ""):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not item.strip():
            continue
        if not (name and equals and value) or "=" in value:
            raise ValueError(f'optim_args={text!r}: {item.strip()!r} is not of the form name=value; write "a=1,b=2".')
        options[name] = value
    return options


def typed(name: str, text: str, like: Any) -> Any:
    """`text` as a value of the same type as `like`, the argument's default; without one (None), as a Python literal.

    An integer default takes a fraction too (SGD's momentum is 0 by default). A tuple takes as many numbers as `like`
    has, separated by a comma or a semicolon.
    """
    try:
        if isinstance(like, bool):
            return _WORDS[text.lower()]
        if isinstance(like, (int, float)):
            return int(text) if isinstance(like, int) and re.fullmatch(r"[+-]?\d+", text) else float(text)
        if isinstance(like, (tuple, list)):
            numbers = tuple(float(number) for number in re.split(r"[,;]", text.strip("()[] ")) if number.strip())
            if len(numbers) != len(like):
                raise ValueError
            return numbers
    except (KeyError, ValueError):
        kind = f"{len(like)} numbers like {like}" if isinstance(like, (tuple, list)) else type(like).__name__
        raise ValueError(f"optim_args: {name}={text!r} cannot be read as {kind}.") from None
    if isinstance(like, str):
        return text
    if text.lower() in ("true", "false"):
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def with_options(
    cls: Callable[..., Any], kwargs: Mapping[str, Any], options: Mapping[str, str], optimizer_name: str
) -> dict[str, Any]:
    """`kwargs` with every option added, typed by the value it replaces or by the default in the signature of `cls`.

    ValueError on an option that `cls` does not take; it lists those it does.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in _ELSEWHERE
    }
    result = dict(kwargs)
    for name, text in options.items():
        if name in _ELSEWHERE:
            raise ValueError(f"optim_args: set {name!r} through {_ELSEWHERE[name]}, not through optim_args.")
        if name not in defaults:
            raise unknown_option(name, defaults, optimizer_name)
        like = kwargs.get(name, defaults[name])
        result[name] = typed(name, text, None if like is inspect.Parameter.empty else like)
    return result


def unknown_option(name: str, allowed: Any, optimizer_name: str) -> ValueError:
    """The error about an option that an optimizer does not have."""
    known = sorted(allowed)
    return ValueError(
        f"optim_args: the optimizer {optimizer_name!r} has no argument {name!r}; it takes {known}."
        f"{closest(name, known)}"
    )
