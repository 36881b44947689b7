"""Replaces the Trainer of the installed `transformers` by ours.

Owns: replacing the reference's objects by ours in every loaded module, and undoing it; sending our messages through the
reference's loggers. Leaves to others: which names (`replaced_names.py`), defaults of the
installed generation (`installed_defaults.py`), running a program (`run_script.py`). Its modules are imported
because their names are replaced in them; its Trainer classes are neither called nor subclassed.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from trainwright import log_output
from trainwright.compat import installed_defaults
from trainwright.compat.replaced_names import OF_PACKAGES, REPLACED, logger_of, ours
from trainwright.interop.optional import installed_version, require

OLDEST = (4, 55)
# Modules without which there is nothing to replace; an error of importing one is raised.
_REQUIRED = ("trainer", "training_args", "training_args_seq2seq")
_ABSENT = object()


class _DropIn:
    """The changes, so that they can be undone."""

    def __init__(self) -> None:
        self.replacement: dict[int, Any] = {}  # id of an original -> ours
        self.original: dict[tuple[str, int], Any] = {}  # (name, id of ours) -> the original
        self.changes: list[tuple[dict[str, Any], str, Any, Any]] = []  # (module's names, name, what was there, ours)
        self.references: list[Any] = []  # to originals: an id is unique only while the object lives

    def add(self, name: str, original: Any, replacement: Any) -> None:
        self.replacement[id(original)] = replacement
        self.original[name, id(replacement)] = original
        self.references.append(original)

    def set(self, names: dict[str, Any], name: str, value: Any) -> None:
        self.changes.append((names, name, names.get(name, _ABSENT), value))
        names[name] = value

    def sweep(self) -> None:
        """Replace the originals in every loaded module, under any name."""
        for _, names in _loaded_modules():
            for name, value in list(names.items()):
                replacement = self.replacement.get(id(value), _ABSENT)
                if replacement is not _ABSENT:
                    self.set(names, name, replacement)

    def undo(self) -> None:
        for names, name, before, value in reversed(self.changes):
            if names.get(name) is not value:
                continue  # it was set to something else meanwhile
            if before is _ABSENT:
                del names[name]
            else:
                names[name] = before
        for module, names in _loaded_modules():  # modules of transformers that were imported, or looked up, meanwhile
            if module.partition(".")[0] == "transformers":
                for name, value in list(names.items()):
                    original = self.original.get((name, id(value)), _ABSENT)
                    if original is not _ABSENT:
                        names[name] = original


_active: _DropIn | None = None


def install() -> None:
    """Replace the Trainer stack of `transformers` by ours in this process. A no-op when it is installed.

    Call it before the program imports anything from `transformers`. Later is possible: names that loaded modules hold
    (`from transformers import Trainer`) are replaced, too. Classes already derived from the reference's Trainer and its
    arguments cannot be changed; a warning names them.

    Raises MissingExtra without `transformers`, ImportError for a release before 4.55.
    """
    global _active
    if _active is not None:
        return
    require("transformers", "trainwright.dropin", extra="transformers")
    version = installed_version("transformers")
    if version is not None and version < OLDEST:
        raise ImportError(
            f"trainwright.dropin replaces the Trainer of transformers 4.55 and newer; installed is "
            f"{'.'.join(map(str, version))}. Upgrade transformers, or change the import lines of the program to "
            "trainwright."
        )
    modules = {name: _imported(f"transformers.{name}") for name in REPLACED}
    for module, name in (("training_args", "TrainingArguments"), ("training_args_seq2seq", "Seq2SeqTrainingArguments")):
        module_of_arguments = modules[module]
        assert module_of_arguments is not None
        installed_defaults.originals[name] = getattr(module_of_arguments, name)
    _warn_of_derived(modules)

    dropin = _DropIn()
    for module, found in modules.items():
        if found is None:  # a module of another generation
            continue
        for name, where in REPLACED[module].items():
            replacement = ours(where)
            original = vars(found).get(name, _ABSENT)
            if original is _ABSENT:  # a name of another generation
                dropin.set(vars(found), name, replacement)
            else:
                dropin.add(name, original, replacement)
    dropin.sweep()
    for package, names in OF_PACKAGES.items():
        for name, where in names.items():
            if not hasattr(sys.modules[package], name):
                dropin.set(vars(sys.modules[package]), name, ours(where))
    _log_as_theirs(dropin)
    ours("trainer:Trainer").default_arguments = installed_defaults.TrainingArguments
    _active = dropin


def _log_as_theirs(dropin: _DropIn) -> None:
    """Send our messages through the loggers of `transformers`, so that its verbosity and handlers apply.

    A module that is imported later has a logger of this package, whose parent is that of the Trainer.
    """
    version = (installed_version("transformers") or OLDEST)[0]
    dropin.set(vars(log_output), "library", "transformers")
    for name, module in list(sys.modules.items()):
        package, _, rest = name.partition(".")
        if package == "trainwright" and isinstance(vars(module).get("logger"), logging.Logger):
            dropin.set(vars(module), "logger", logging.getLogger(logger_of(rest, version)))
    library = logging.getLogger(log_output.LIBRARY)
    dropin.set(vars(library), "parent", logging.getLogger("transformers.trainer"))
    dropin.set(vars(library), "level", logging.NOTSET)
    library.setLevel(logging.NOTSET)  # forgets which levels were found enabled


def uninstall() -> None:
    """Undo `install`. Modules of yours that were imported meanwhile keep what they imported."""
    global _active
    if _active is None:
        return
    _active.undo()
    library = logging.getLogger(log_output.LIBRARY)
    library.setLevel(library.level)  # forgets which levels were found enabled
    _active = None
    ours("trainer:Trainer").default_arguments = ours("args.training:TrainingArguments")


def is_active() -> bool:
    """Whether the Trainer of `transformers` is ours now."""
    return _active is not None


def _imported(name: str) -> ModuleType | None:
    """The module, or None where it cannot be imported: it is of another generation, or needs an optional package that
    is absent (`transformers.utils.notebook` needs IPython).
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        is_optional = name.partition(".")[2] not in _REQUIRED and missing.partition(".")[0] != "transformers"
        if missing != name and not is_optional:
            raise
        return None


def _loaded_modules() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, namespace) of every loaded module but ours. Reads `vars()`, which loads no lazy module."""
    for name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict) and name.partition(".")[0] != "trainwright":
            yield name, names


def _warn_of_derived(modules: dict[str, ModuleType | None]) -> None:
    """Warn of classes that were derived from the reference's before: they are not replaced."""
    derived: list[str] = []
    for module, name in (("trainer", "Trainer"), ("training_args", "TrainingArguments")):
        base: Any = getattr(modules[module], name)
        for found in _subclasses(base):
            if found.__module__.partition(".")[0] not in ("transformers", "trainwright"):
                derived.append(f"{found.__module__}.{found.__qualname__}")
    if derived:
        warnings.warn(
            "Derived from the Trainer stack of transformers before trainwright.dropin.install(), these stay with it: "
            f"{', '.join(sorted(set(derived)))}. Call install() before the modules that define them are imported.",
            RuntimeWarning,
            stacklevel=3,
        )


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for found in base.__subclasses__():
        yield found
        yield from _subclasses(found)
