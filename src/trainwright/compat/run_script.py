"""Run an unmodified program on our Trainer, as the interpreter would run it.

Owns: `sys.argv`, `sys.path[0]` and `__main__` of the program, and processes that it spawns. Leaves to others: replacing
the Trainer (`dropin.py`), the command line (`cli.py`).
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import multiprocessing.spawn
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from trainwright.compat import dropin


def run_script(path: str, arguments: Sequence[str] = (), *, needs_transformers: bool = True) -> None:
    """Run the file `path` as `python path arguments...` does. Its exceptions, SystemExit included, propagate.

    needs_transformers: else a program is run without the drop-in where there is no transformers.
    """
    loader = SourceFileLoader("__main__", os.path.abspath(path))
    code = loader.get_code("__main__")
    assert code is not None
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    _run(code, [path, *arguments], loader.path, None, loader, needs_transformers)


def module_spec(name: str) -> ModuleSpec | None:
    """Where the module `name`, or `__main__` of the package `name`, is found from the current folder; None: nowhere."""
    sys.path[0] = os.getcwd()
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:  # of a package above it
        return None
    return spec if hasattr(getattr(spec, "loader", None), "get_code") else None


def run_module(spec: ModuleSpec, arguments: Sequence[str] = (), *, needs_transformers: bool = True) -> None:
    """Run the module of `module_spec` as `python -m` does; `needs_transformers` as of `run_script`."""
    loader: Any = spec.loader
    code: CodeType = loader.get_code(spec.name)
    _run(code, [spec.origin or spec.name, *arguments], spec.origin, spec, loader, needs_transformers)


def _run(
    code: CodeType, argv: list[str], file: str | None, spec: ModuleSpec | None, loader: Any, needs_transformers: bool
) -> None:
    if needs_transformers or importlib.util.find_spec("transformers") is not None:
        dropin.install()
        _install_in_spawned_processes()
    program = ModuleType("__main__")
    vars(program).update(
        __file__=file,
        __spec__=spec,
        __loader__=loader,
        __package__=spec.parent if spec is not None else None,
        __cached__=spec.cached if spec is not None else None,
        __builtins__=__builtins__,
    )
    sys.argv[:] = argv
    # The program stays `__main__` until the process ends: exit handlers, threads and pickles look there.
    sys.modules["__main__"] = program
    exec(code, vars(program))


class _Installer:
    """An object that installs the drop-in where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return dropin.install, ()


def _install_in_spawned_processes() -> None:
    """A spawned process imports the program again. Its preparation data is unpickled before, so the installer is added
    there."""
    prepare = multiprocessing.spawn.get_preparation_data
    if getattr(prepare, "installs_dropin", False):
        return

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {**prepare(name), "trainwright": _Installer()}

    get_preparation_data.installs_dropin = True  # type: ignore[attr-defined]
    multiprocessing.spawn.get_preparation_data = get_preparation_data
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload([])  # the server would import the program without the drop-in
