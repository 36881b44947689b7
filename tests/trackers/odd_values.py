"""What each tracker keeps of odd names and values: `odd_values.json`, of which `docs/trackers.md` is made.

The battery checks it, and writes it with TRAINWRIGHT_WRITE_ODD_VALUES=1.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import scenarios
from battery import Reader, StoredRun

FILE = Path(__file__).parent / "odd_values.json"
WRITES = bool(os.environ.get("TRAINWRIGHT_WRITE_ODD_VALUES"))
KEPT, LEFT_OUT = "kept", "left out"
MANY = "120 more settings"


def release(reader: Reader) -> str:
    """The installed release; "" of a tracker without a package."""
    return importlib.metadata.version(reader.distribution) if reader.distribution else ""


def offline(reader: Reader) -> dict[str, str]:
    """The variables that keep it on its machine, with "..." for the folder it writes to."""
    if not reader.distribution:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        return {name: value.replace(folder, "...") for name, value in reader.environment(Path(folder)).items()}


def kept(reader: Reader, run: StoredRun) -> dict[str, dict[str, str]]:
    """What became of each odd name and value, in words."""
    scalars = {name: [value for _, value in points] for name, points in run.scalars.items()}
    found: dict[str, dict[str, str]] = {"values": {}, "settings": {}}
    if "scalars" not in reader.lacks:
        for name, value in scenarios.ODD_SCALARS.items():
            found["values"][label(name)] = _of_scalar(reader.scalar(name), value, scalars)
    if "parameters" not in reader.lacks:
        settings = {name: value for name, value in scenarios.ODD_PARAMETERS.items() if not name.startswith("many_")}
        for name, value in settings.items():
            found["settings"][label(name)] = _of_setting(name, value, run.parameters)
        many = [name for name in scenarios.ODD_PARAMETERS if name.startswith("many_")]
        there = sum(any(_ends_with(key, name) for key in run.parameters) for name in many)
        found["settings"][MANY] = KEPT if there == len(many) else f"{there} of them"
    return found


def check(reader: Reader, run: StoredRun) -> None:
    """Compare with the file, or write it."""
    now = {"release": release(reader), "offline": offline(reader), **kept(reader, run)}
    with FILE.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another worker writes what it found of another tracker
        everything: dict[str, Any] = json.load(file)
        if not WRITES:
            assert everything.get(reader.name) == now, "TRAINWRIGHT_WRITE_ODD_VALUES=1 writes it; then `make docs`"
            return
        text = json.dumps(everything | {reader.name: now}, indent=1, sort_keys=True, ensure_ascii=False)
        file.seek(0)
        file.truncate()
        file.write(text + "\n")


def is_of_this_release(reader: Reader) -> bool:
    """Whether the file tells of the installed release."""
    everything = json.loads(FILE.read_text(encoding="utf-8"))
    return bool(everything.get(reader.name, {}).get("release") == release(reader))


def label(name: str) -> str:
    """A name of 250 characters is not printed."""
    return name if len(name) < 100 else f"{name[0]} {len(name)} times"


def _of_scalar(name: str, value: Any, scalars: dict[str, list[Any]]) -> str:
    if name in scalars:
        return _words(value, scalars[name][0])
    if isinstance(value, dict):  # flattened
        (number,) = value.values()
    elif isinstance(value, float) and 10 < value < 20:
        number = value
    else:
        return LEFT_OUT
    return next((_renamed(name, key) for key, values in scalars.items() if number in values), LEFT_OUT)


def _of_setting(name: str, value: Any, settings: dict[str, Any]) -> str:
    for key, found in settings.items():
        if _ends_with(key, name):
            return _words(value, found)
    number = 1002 if name == "nested" else value  # one of those that are there once
    if isinstance(number, int) and number > 1000:
        for key, found in settings.items():
            if str(found) == str(number):
                return _renamed(name, key)
    return LEFT_OUT


def _ends_with(key: str, name: str) -> bool:
    """Whether `key` is `name` below the tracker's own prefix."""
    return key == name or (key.endswith(name) and key[-len(name) - 1] in "/.|" and ".." not in key[: -len(name)])


def _renamed(name: str, key: str) -> str:
    if len(name) > 200:
        return f"cut to {len(key)} characters"
    is_below = name in key  # the name of something nested
    return f"as `{key[key.index(name) :] if is_below else key}`"


def _words(value: Any, found: Any) -> str:
    """What is stored in place of `value`."""
    if isinstance(value, float) and math.isnan(value) and isinstance(found, float) and math.isnan(found):
        return KEPT
    if type(found) is type(value) and found == value:
        return KEPT
    if not isinstance(value, bool) and isinstance(value, (int, float)) and isinstance(found, (int, float)):
        if not isinstance(found, bool) and (found == value or math.isclose(found, value, rel_tol=1e-6)):
            return KEPT
    if isinstance(found, str) and isinstance(value, str) and len(found) != len(value):
        return f"cut to {len(found)} characters"
    if isinstance(found, str) and found in (str(value), json.dumps(value)):
        return "as text"
    return f"`{found!r}`" if len(repr(found)) < 60 else f"{len(repr(found))} characters"
