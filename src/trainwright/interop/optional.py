"""Optional dependencies: whether one is installed, and the error that names how to install it.

Owns: availability and `MissingExtra`. Leaves to others: importing the dependency where it is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from types import ModuleType


class MissingExtra(ImportError, ValueError):
    """An optional dependency is needed and absent; the message has the pip command that adds it.

    Also a ValueError, for scripts that then fall back to another value of the argument.
    """

    def __init__(self, needed_for: str, package: str, extra: str | None = None) -> None:
        remedy = f"pip install 'trainwright[{extra}]'" if extra else f"pip install {package}"
        super().__init__(f"{needed_for} needs the package {package!r}, which is not installed. Run: {remedy}")
        self.package = package


@functools.cache
def is_installed(module: str) -> bool:
    """Whether `import module` would find something. Looks for the file, does not run it (about 50 us, once)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is missing, or a stub without a spec is in sys.modules
        return False


@functools.cache
def version_text(distribution: str) -> str | None:
    """The installed release, such as "5.23.0rc1"; None when absent. Reads a file (about 1 ms, once)."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def installed_version(distribution: str) -> tuple[int, ...] | None:
    """The installed release as integers, `(5, 23, 0)` for "5.23.0rc1"; None when absent."""
    text = version_text(distribution)
    return None if text is None else tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def require(module: str, needed_for: str, package: str | None = None, extra: str | None = None) -> ModuleType:
    """Import `module` or raise `MissingExtra` naming what needed it and how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the package is there, one of its dependencies is not; the message names it
        raise MissingExtra(needed_for, package or top, extra) from error
