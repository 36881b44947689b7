"""What the tests of all trackers share: what a tracker's own reader returns, and running a scenario in a process.

A tracker's `Reader` is in `readers/NAME.py`. A scenario (`scenarios.py`) runs in a fork of this process, which has
torch, transformers and trainwright imported and no tracker: packages keep the first directory, run or connection they
see until the process ends. What was stored is read in another fork, when that process is gone. What a tracker imports
besides itself (pandas, pydantic ...) is imported here after its first program, for those that follow.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest

import forked
from trainwright.interop.trackers import TRACKERS
from trainwright.tracking.base import rewrite_logs

LIMIT_S = 600.0  # of one process, on a machine with much else to do
# Of the user who runs the tests: a tracker must not find an account there, nor leave anything.
OF_TRACKERS = (
    *("WANDB_", "COMET_", "MLFLOW_", "CLEARML_", "NEPTUNE_", "SWANLAB_", "TRACKIO_", "DVC", "CODECARBON_", "DAGSHUB_"),
    *("HF_MLFLOW_", "HF_DAGSHUB_", "HF_DVCLIVE_", "TENSORBOARD_", "AZUREML_", "FLYTE_", "KUBEFLOW_", "DISABLE_"),
)
GROUP = os.environ.get("TRAINWRIGHT_TRACKERS")  # of requirements-GROUP.txt, all of which must be installed


@dataclass
class StoredRun:
    """What the package's own reader returns of one run."""

    name: str | None
    status: str | None  # "finished", "failed", "killed", "running"; None: the package keeps no status
    scalars: dict[str, list[tuple[int | None, float]]]  # name -> (step, value) in the order of storage
    parameters: dict[str, Any]  # as the package returns them
    artifacts: dict[str, list[str]] = field(default_factory=dict)  # name (or name:alias) -> files
    group: str | None = None  # of the trials of a search, or the parent


class Reader:
    """Of one tracker. `readers/NAME.py` has a subclass called `Reader`."""

    name: ClassVar[str]  # as in report_to
    distribution: ClassVar[str]  # as pip calls it; "": needs no package
    # What this package has no room for, each with the reason, which the battery then holds: "scalars", "steps",
    # "status", "finished" (says nothing then), "killed" (shown as failed), "artifacts", "parameters", "resume", "later
    # lines" (after train()), "runs" (keeps one only), "names" and "group" (of trials).
    lacks: ClassVar[dict[str, str]] = {}
    sends_within_s: ClassVar[float] = 0.0  # what a process that crashes has not sent by then is lost
    calls_per_step: ClassVar[int] = 0  # between two log lines
    constructor: ClassVar[dict[str, Any]] = {}  # arguments of the callback, which is given to the Trainer then
    # Packages of trackers that remember nothing from when they are imported: not anew in each program.
    imported_once: ClassVar[tuple[str, ...]] = ()

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables that keep it offline, writing below `folder`, which is the working directory."""
        return {}

    def runs(self, folder: Path) -> list[StoredRun]:
        """What was stored below `folder`, oldest run first."""
        raise NotImplementedError

    def scalar(self, name: str) -> str:
        """The name of a log line's value in the tracker."""
        return next(iter(rewrite_logs({name: 0})))


def readers() -> list[Reader]:
    """All there are, by their file names."""
    names = sorted(path.stem for path in (Path(__file__).parent / "readers").glob("[a-z]*.py"))
    return [reader_of(name) for name in names]


def reader_of(name: str) -> Reader:
    """The reader of one tracker."""
    reader: Reader = importlib.import_module(f"readers.{name}").Reader()
    return reader


def group() -> set[str]:
    """The distributions that `make test-trackers` has installed here, in lower case."""
    if GROUP is None:
        return set()
    lines = (Path(__file__).parent / f"requirements-{GROUP}.txt").read_text().splitlines()
    return {line.strip().lower() for line in lines if line.strip() and not line.startswith("#")}


def needs(name: str) -> None:
    """Skip where the package of this tracker is not installed; fail where it should be."""
    row, reader = TRACKERS[name], reader_of(name)
    if row.missing and reader.distribution.lower() in group():
        pytest.fail(f"{row.missing} is in requirements-{GROUP}.txt and is not installed")
    if row.missing:
        pytest.skip(f"needs {row.missing}: make test-trackers, or pip install 'trainwright[{row.extra}]' elsewhere")
    if GROUP is not None and reader.distribution.lower() not in group():
        pytest.skip(f"{name} is not of the group {GROUP}")


def program(
    reader: Reader, folder: Path, action: Callable[[], Any], environ: dict[str, str] | None = None, code: int = 0
) -> Any:
    """What `action()` returns in a process that has `folder` as its working directory and ends as Python ends.

    `environ`: further variables. `code`: its exit code; other than 0, nothing is returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = reader.environment(folder)
    variables = {"HOME": str(folder / "home"), **own, **(environ or {})}
    in_process = lambda _: (_as_program(action, folder, variables), list(sys.modules))  # noqa: E731
    (ended,) = forked.start([variables], in_process, folder, limit_s=LIMIT_S)
    assert ended.code == code, f"{reader.name}: exit code {ended.code}\n{ended.output}\n{ended.error}"
    assert "Traceback" not in ended.output or code, ended.output
    if ended.result is None:
        return None
    returned, modules = ended.result
    if GROUP is not None:  # else other tests run in this process, too
        _import_for_others(reader, modules, own)
    return returned


def _import_for_others(reader: Reader, names: list[str], variables: dict[str, str]) -> None:
    """Import what a program of `reader` has imported, but for the tracker itself: half of the time of most programs."""
    not_here = {"trainwright", "readers", "azureml", *TRACKERS} - {*reader.imported_once}
    register = lambda *given, **named: _AT_EXIT.append((given, named))  # noqa: E731
    with (
        warnings.catch_warnings(),
        mock.patch.dict(os.environ, variables),
        mock.patch.object(atexit, "register", register),
    ):
        warnings.simplefilter("ignore")
        for name in names:
            if name not in _TRIED and name.partition(".")[0] not in not_here:
                with contextlib.suppress(Exception):  # a module that is made, not imported
                    importlib.import_module(name)
    _TRIED.update(names)


_TRIED: set[str] = set()  # names of modules that were imported here, or should be
_AT_EXIT: list[tuple[Any, Any]] = []  # what these want called when a program ends


def _as_program(action: Callable[[], Any], folder: Path, variables: dict[str, str]) -> Any:
    for name in list(os.environ):
        if name.startswith(OF_TRACKERS) and name not in variables:
            del os.environ[name]
    os.makedirs(variables["HOME"], exist_ok=True)
    os.chdir(folder)
    script = folder / "train.py"  # of the user
    if not script.exists():  # where there is none, ClearML reads every file around it to find what it imports
        script.write_text("import torch\n")
    sys.argv = [str(script)]
    atexit._clear()  # what is left of the parent
    for given, named in _AT_EXIT:
        atexit.register(*given, **named)
    try:
        return action()
    except BaseException as error:
        if not isinstance(error, SystemExit):
            sys.last_value = error  # as Python does
            traceback.print_exc()
            raise SystemExit(1) from None
        raise
    finally:
        sys.stdout.flush()
        _end_as_python_does()


def _end_as_python_does() -> None:
    """Tell thread pools (and Comet) to end, wait for the threads that are not daemons, then what is to be called."""
    for hook in reversed(threading._threading_atexits):
        hook()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(60)
            if thread.is_alive():
                print(f"{thread} would keep this program from ending.")
                raise SystemExit(97)
    atexit._run_exitfuncs()


def stored(reader: Reader, folder: Path) -> list[StoredRun]:
    """What the package's own reader finds below `folder`, in a process of its own."""
    runs: list[StoredRun] = program(reader, folder, functools.partial(reader.runs, folder))
    return runs
