"""A plugin of pytest that runs the tests of every mutant in a process of its own, forked from one that has them ready.

pytest collects the tests once, with everything imported. Then, in place of its loop, this runs them all unchanged and
notes which of them call which function; and for each mutant forks a process that has it in place of its function and
runs the tests that call that one, the quickest first, until one fails. Reads plan.json in the working directory, writes
first.json and, line by line, results.jsonl (mutant, outcome).

A process that uses more processor time than its tests can, or stands still, has not passed: the mutant is caught.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# What a small run imports only where it is used: here, so that not every mutant imports it again.
import accelerate  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.data.data_collator
import transformers.trainer_pt_utils  # noqa: F401
from mutmut.configuration import config
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state

import trainwright.trainer  # noqa: F401

MEMORY_BYTES = 8 << 30  # address space of a test process; importing everything takes less than 1 GiB
MOST_WALL_S = 60  # of one mutant, however many others use the machine
has_mutant = False  # this process runs one
MOST_TIMES = 20  # the processor time that the tests took before, and two seconds


def pytest_runtestloop(session: pytest.Session) -> bool:
    if session.testsfailed:  # while they were collected
        return False
    config()  # read from the working directory before a test changes it
    gc.collect()
    gc.freeze()
    plan = json.loads(Path("plan.json").read_text(encoding="utf-8"))
    items = {item.nodeid: item for item in session.items}
    noted = Path("first.json").absolute()
    in_child(lambda: first_run(session, noted), cpu_s=10_000, wall_s=10_000)
    first = json.loads(Path("first.json").read_text(encoding="utf-8"))
    if first["failed"]:
        return False
    with open("results.jsonl", "w", encoding="utf-8") as results:
        for module, tests, mutants in plan:
            ordered = sorted(first["seconds"], key=first["seconds"].__getitem__)
            quickest_first = [name for name in ordered if name.split("::")[0] in tests]
            for mutant in ["", *mutants]:  # first none: the tests must pass in this order, too
                function = mutant.partition("__mutmut_")[0]
                called_by = [name for name in quickest_first if not mutant or function in first["hits"][name]]
                outcome = "no test"
                if called_by:
                    cpu_s = 2 + MOST_TIMES * sum(first["seconds"][name] for name in called_by)
                    chosen = [items[name] for name in called_by]
                    outcome = in_child(lambda: passes(session, chosen, mutant), cpu_s, MOST_WALL_S)  # noqa: B023
                print(json.dumps([module, mutant, outcome]), file=results, flush=True)
    return True


def first_run(session: pytest.Session, first: Path) -> bool:
    """Run every test as it is; note how long each takes, which functions it calls, and which fail."""
    set_mutant_under_test("stats")
    found: dict[str, Any] = {"hits": {}, "seconds": {}, "failed": []}
    for place, item in enumerate(session.items):
        before, num_failed = time.process_time(), session.testsfailed
        run(session, [item, *session.items[place + 1 : place + 2]], 1)
        found["seconds"][item.nodeid] = time.process_time() - before
        found["hits"][item.nodeid] = sorted(state()._stats)
        state()._stats.clear()
        if session.testsfailed > num_failed:
            found["failed"].append(item.nodeid)
    first.write_text(json.dumps(found), encoding="utf-8")
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
    """The first failure is all that is asked for: no report of it is written."""
    if has_mutant and call.excinfo is not None and not isinstance(call.excinfo.value, pytest.skip.Exception):
        os._exit(1)


def passes(session: pytest.Session, items: list[pytest.Item], mutant: str) -> bool:
    global has_mutant
    has_mutant = True
    set_mutant_under_test(mutant)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    return run(session, items, len(items))


def run(session: pytest.Session, items: list[pytest.Item], number: int) -> bool:
    """Run the first `number` of `items` until one fails; whether none does."""
    num_failed = session.testsfailed
    for place in range(number):
        following = items[place + 1] if place + 1 < len(items) else None
        items[place].config.hook.pytest_runtest_protocol(item=items[place], nextitem=following)
        if session.testsfailed > num_failed:
            return False
    return True


def in_child(work: Callable[[], bool], cpu_s: float, wall_s: float) -> str:
    """Do `work` in a process with limits: "lives" where it returned True, "timeout" where a limit ended it."""
    empty = tempfile.mkdtemp()  # what a mutant writes into its working directory reaches no other one
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s) + 1, int(cpu_s) + 3))
            os.chdir(empty)
            code = 0 if work() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + wall_s
    is_late = False
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline and not is_late:
            is_late = True
            _kill(pid)
        time.sleep(0.004)
    _kill(pid)  # what it started and left behind
    shutil.rmtree(empty, ignore_errors=True)
    status = os.waitstatus_to_exitcode(done[1])
    if is_late or status in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout"
    return "lives" if status == 0 else "caught"


def _kill(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
