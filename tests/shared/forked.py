"""Processes with the variables of a launcher that is not here: forks of this one, which has imported everything.

Owns: starting them, their limit in time, what they gave back. Each costs a fraction of a second.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LIMIT_S = 120.0  # of processes that should end by themselves, on a machine with much else to do
OF_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_", "OMPI_", "PMI"),
    *("TORCHELASTIC_", "ACCELERATE_", "PET_", "SUBMITIT_", "SKYPILOT_", "KUBERNETES_"),
)


@dataclass
class Ended:
    """One process that has ended."""

    code: int  # exit code; of a signal the negative number
    result: Any  # None where it did not come to its end
    error: str  # traceback, "" where there was none
    output: str  # stdout and stderr
    seconds: float  # until it ended


def start(
    environments: Sequence[Mapping[str, str]],
    action: Callable[[int], Any],
    folder: Path,
    *,
    limit_s: float = LIMIT_S,
    meanwhile: Callable[[list[int]], None] | None = None,
) -> list[Ended]:
    """`action(number)` in a process for each of `environments`, all at once. `meanwhile(pids)`: called in this one.

    AssertionError where one is still there after `limit_s`; all are killed then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    pids = [_fork(environ, number, action, folder) for number, environ in enumerate(environments)]
    left, codes, seconds = dict(enumerate(pids)), {}, {}
    try:
        if meanwhile is not None:
            meanwhile(pids)
        while left and time.monotonic() < begin + limit_s:
            for number, pid in list(left.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[number] = os.waitstatus_to_exitcode(status)
                    seconds[number] = time.monotonic() - begin
                    del left[number]
            time.sleep(0.005)
    finally:
        for pid in left.values():
            os.kill(pid, signal.SIGQUIT)  # says where it is
        time.sleep(0.5 if left else 0)
        for pid in left.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    outputs = [(folder / f"output-{number}").read_text(errors="replace") for number in range(len(pids))]
    assert not left, f"after {limit_s} s there are still {list(left)}:\n" + "\n".join(outputs)
    return [
        Ended(
            codes[number],
            pickle.loads(result.read_bytes()) if (result := folder / f"result-{number}").exists() else None,
            error.read_text() if (error := folder / f"error-{number}").exists() else "",
            outputs[number],
            seconds[number],
        )
        for number in range(len(pids))
    ]


def _fork(environ: Mapping[str, str], number: int, action: Callable[[int], Any], folder: Path) -> int:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(folder / f"output-{number}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        faulthandler.register(signal.SIGQUIT)
        logging.getLogger().handlers.clear()  # pytest's
        for name in list(os.environ):
            if name.startswith(OF_LAUNCHERS):
                del os.environ[name]
        os.environ.update({"GLOO_SOCKET_IFNAME": "lo", **environ})
        torch.set_num_threads(1)
        for state in (AcceleratorState, GradientState, PartialState):  # what other tests built in the parent
            state._reset_state()
        (folder / f"result-{number}").write_bytes(pickle.dumps(action(number)))
        code = 0
    except SystemExit as error:
        code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    except BaseException:
        (folder / f"error-{number}").write_text(traceback.format_exc())
    os._exit(code)
