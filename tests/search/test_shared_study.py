"""Several processes that share one Optuna study: each trial is trained once, and all agree on the best."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

optuna = pytest.importorskip("optuna")

WORKER = Path(__file__).parent / "worker.py"
NUM_PROCESSES, NUM_TRIALS = 2, 3  # trials of each process
MOST_WAIT_S = 300


class Worker(NamedTuple):
    """What one process printed: the trials it trained, the best one it was told, and its log."""

    trained: list[int]
    best: list[Any]
    log: str


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server, reached by a socket in its directory; skips where none is installed."""
    pytest.importorskip("psycopg2")
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("needs initdb and postgres (on Debian: apt install postgresql)")
    user: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}  # it refuses root
    folder = tempfile.mkdtemp(prefix="pg")  # short: the path of a socket has at most 107 characters
    if user:
        shutil.chown(folder, **user)
    server = None
    try:
        options: dict[str, Any] = {**user, "cwd": folder, "env": {**os.environ, "LC_ALL": "C"}}
        subprocess.run(
            ["initdb", "-D", f"{folder}/data", "-U", "search", "-A", "trust", "--no-sync"],
            check=True, capture_output=True, timeout=MOST_WAIT_S, **options,
        )  # fmt: skip
        command = ["postgres", "-D", f"{folder}/data", "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        deadline = time.monotonic() + 60
        while not Path(folder, ".s.PGSQL.5432").exists():
            assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        yield f"postgresql+psycopg2://search@/postgres?host={folder}"
    finally:
        if server is not None:
            server.terminate()
            server.wait(60)
        shutil.rmtree(folder)


def started(output_dir: Path, storage: str, num_trials: int, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(output_dir), storage, str(num_trials), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> Worker:
    output, log = process.communicate(timeout=MOST_WAIT_S)
    assert process.returncode == 0, log
    found = json.loads(output.splitlines()[-1])
    return Worker(found["trained"], found["best"], log)


def storage_in(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    if kind == "postgresql":
        return str(request.getfixturevalue("postgres"))
    return f"sqlite:///{folder}/study.db" if kind == "sqlite" else str(folder / "journal.log")


@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgresql"])
def test_processes_that_share_a_study_train_each_trial_once_and_agree_on_the_best(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    storage = storage_in(kind, tmp_path, request)
    workers = [finished(process) for process in [started(out, storage, NUM_TRIALS) for _ in range(NUM_PROCESSES)]]
    numbers = sorted(number for worker in workers for number in worker.trained)
    assert numbers == list(range(NUM_PROCESSES * NUM_TRIALS))
    # Each trial has its own directory, so no process warns of the other one.
    for number in numbers:
        assert (out / f"run-{number}" / "checkpoint-4" / "manifest.json").is_file()
    assert not any("ANOTHER RUN" in worker.log for worker in workers)
    # The process that ended last has seen all trials.
    states = (out / "search_trials.csv").read_text().splitlines()
    values = [float(line.split(",")[2]) for line in states[1:]]
    assert [line.split(",")[:2] for line in states[1:]] == [[str(number), "complete"] for number in numbers]
    last = [str(values.index(min(values))), min(values)]
    assert last in [worker.best for worker in workers]


def test_a_trial_whose_process_was_killed_is_named_and_the_search_continues(tmp_path: Path) -> None:
    out, storage = tmp_path / "out", f"sqlite:///{tmp_path}/study.db"
    process = started(out, storage, NUM_TRIALS, "die")
    process.communicate(timeout=MOST_WAIT_S)
    assert process.returncode == -9
    other = finished(started(out, storage, 2))
    assert other.trained == [1, 2] and other.best[0] in ("1", "2")
    assert "Not finished in the study 'shared': trials 0." in other.log
    assert "heartbeat_interval=60" in other.log
    rows = (out / "search_trials.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["running", "complete", "complete"]
