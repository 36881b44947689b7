"""Parse, normalise and validate one argument.

Owns: the wording of "this value is not allowed". Leaves to others: which argument must satisfy what (each topic).
Every function reads `getattr(args, name)` and writes the normalised value back, so it may run any number of times.
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Iterable
from enum import Enum
from typing import Any, TypeVar

from trainwright.names import ExplicitEnum, closest

SomeEnum = TypeVar("SomeEnum", bound=ExplicitEnum)


def parse_number(name: str, value: Any, wanted: str = "") -> int | float:
    """`value` as a number; text is converted, because YAML reads `1e-4` (without a point) as text.

    `wanted`: which number is needed, for the error.
    """
    needed = f"; {wanted} is needed" if wanted else ""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            try:
                return float(value)
            except ValueError:
                raise ValueError(f"{name}={value!r} is not a number{needed}.") from None
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name}={value!r} is a {type(value).__name__}; {wanted or 'a number'} is needed.")


def check_number(
    args: object,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    whole: bool = False,
    optional: bool = False,
    infinite: bool = False,
    hint: str = "",
) -> None:
    """Require `low <= value <= high`.

    Args:
        above, below: the bound itself is not allowed (`low <`, `< high`).
        whole: an integer is needed; 3.0 becomes 3, 3.5 is an error.
        optional: None is allowed.
        infinite: `inf` is allowed; NaN never is.
        hint: the remedy, a sentence appended to the error.
    """
    value = getattr(args, name)
    if value is None and optional:
        return
    kind = "whole number" if whole else "number"
    bounds = []
    if low > -math.inf:
        bounds.append(f"greater than {low}" if above else f"at least {low}")
    if high < math.inf:
        bounds.append(f"less than {high}" if below else f"at most {high}")
    wanted = f"a {'' if infinite else 'finite '}{kind} {' and '.join(bounds)}".rstrip()
    wanted += " or None" if optional else ""
    number = parse_number(name, value, wanted)
    finite = math.isfinite(number) or (infinite and not math.isnan(number))
    inside = (low < number if above else low <= number) and (number < high if below else number <= high)
    integral = not whole or (math.isfinite(number) and number == int(number))
    if not (finite and inside and integral):
        raise ValueError(f"{name}={value!r} is not allowed: it must be {wanted}. {hint}".strip())
    setattr(args, name, int(number) if whole else number)


def check_interval(args: object, name: str, *, needed_by: str | None) -> None:
    """A distance between two events: a whole number of updates, or a share of the run in (0, 1).

    Args:
        needed_by: the setting that makes the interval take effect, for the message; None where 0 and None are harmless.
    """
    value = getattr(args, name)
    if needed_by is None and value in (None, 0):
        return
    if value is None:
        raise ValueError(f"{needed_by} needs {name}: a number of updates, or a share of the run below 1.")
    number = parse_number(name, value)
    if not (math.isfinite(number) and number > 0):
        because = f", because {needed_by}" if needed_by else ""
        raise ValueError(
            f"{name}={value!r} is not allowed{because}: it must be greater than 0. To switch it off, set the "
            "strategy to 'no'."
        )
    if number >= 1 and number != int(number):
        raise ValueError(
            f"{name}={value!r} is not allowed: from 1 on it counts updates and must be a whole number; below 1 it "
            "is a share."
        )
    setattr(args, name, int(number) if number >= 1 else number)


def check_enum(args: object, name: str, enum: type[SomeEnum]) -> None:
    """Turn the value into a member of `enum`; False means "no" where the enum has it, as YAML reads a bare `no`."""
    setattr(args, name, parse_enum(name, getattr(args, name), enum))


def parse_enum(name: str, value: Any, enum: type[SomeEnum]) -> SomeEnum:
    """`value` (text, a member, or a member of another library's enum) as a member of `enum`."""
    if isinstance(value, enum):
        return value
    text = value.value if isinstance(value, Enum) else value
    if text in (False, "False", "false") and "no" in [member.value for member in enum]:
        text = "no"
    try:
        return enum(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_switch(args: object, name: str) -> None:
    """Require True or False itself: text such as "False" would count as true."""
    value = getattr(args, name)
    if not isinstance(value, bool):
        likely = str(value).strip().capitalize()
        raise TypeError(
            f"{name}={value!r} must be True or False."
            + (f" Did you mean {likely}, without quotes?" if likely in ("True", "False") else "")
        )


def check_choice(args: object, name: str, allowed: Iterable[Any]) -> None:
    """Require one of `allowed`."""
    value, options = getattr(args, name), list(allowed)
    if value not in options:
        raise ValueError(f"{name}={value!r} is not allowed; choose one of {options}.{closest(str(value), options)}")


def typed(value: Any) -> Any:
    """Text inside a parsed dict as the number, boolean or None it spells; everything else unchanged, nested."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    if not isinstance(value, str):
        return value
    lowered = value.strip().lower()
    if lowered in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(lowered)
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def read_json_file(name: str, path: str) -> dict[str, Any]:
    """The dict in the JSON file `path`; errors name the argument that pointed at it."""
    if not os.path.isfile(path):
        raise ValueError(
            f"{name}={path!r} is neither a dict, a JSON text starting with '{{', nor an existing .json file."
        )
    with open(path, encoding="utf-8") as file:
        return parse_json(name, file.read())


def parse_json(name: str, text: str) -> dict[str, Any]:
    """The dict spelled by `text`; a list or a syntax error is an error that names the argument."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name} is not valid JSON ({error}). On a command line put it in single quotes: '{{\"key\": 1}}'."
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object such as '{{\"key\": 1}}', not {type(value).__name__}.")
    return value


def check_dict(args: object, name: str, *, file_ok: bool = False, keep_path: bool = False) -> None:
    """A dict, or JSON text of one (its text values are typed), or None.

    Args:
        file_ok: the path of a .json file is read.
        keep_path: a path stays as it is, because the library behind the argument reads the file itself.
    """
    value = getattr(args, name)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, dict):
        return
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} must be a dict or JSON text, not {type(value).__name__}.")
    if value.lstrip().startswith("{"):
        setattr(args, name, typed(parse_json(name, value)))
    elif keep_path:
        setattr(args, name, value)
    elif file_ok:
        setattr(args, name, read_json_file(name, value))
    else:
        raise ValueError(f"{name}={value!r} is not allowed: pass a dict or a JSON text such as '{{\"key\": 1}}'.")


def check_rates(args: object, name: str) -> None:
    """A dict from text to learning rates, JSON text of one, or None."""
    check_dict(args, name)
    if (value := getattr(args, name)) is None:
        return
    rates = {str(key): float(parse_number(f"{name}[{key!r}]", rate)) for key, rate in value.items()}
    for key, rate in rates.items():
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"{name}[{key!r}]={rate!r} is not allowed: a learning rate must be 0 or greater.")
    setattr(args, name, rates)
