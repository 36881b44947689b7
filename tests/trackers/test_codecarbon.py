"""What only CodeCarbon does: it measures, with threads, a lock file and signal handlers."""

from __future__ import annotations

import csv
import os
import signal
import tempfile
import threading
from pathlib import Path

import pytest

from battery import needs, program, reader_of
from scenarios import At, fail, trainer

NAME = "codecarbon"
ALONE = {"CODECARBON_ALLOW_MULTIPLE_RUNS": "False"}
pytestmark = pytest.mark.xdist_group(NAME)


@pytest.fixture
def reader():
    needs(NAME)
    return reader_of(NAME)


def rows(file):
    with open(file) as table:
        return list(csv.DictReader(table))


def alone(folder):
    """The lock file of this process is in `folder`: others on this machine may measure, too."""
    tempfile.tempdir = str(folder)


def test_a_training_that_fails_is_measured_and_leaves_no_thread_handler_or_lock(reader, tmp_path):
    def action():
        alone(tmp_path)
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        threads = set(threading.enumerate())
        for name in ("first", "second"):
            with pytest.raises(RuntimeError, match="out of luck"):
                trainer(reader, name, (At(3, fail(RuntimeError("out of luck"))),)).train()
        left = [thread for thread in threading.enumerate() if thread not in threads and thread.is_alive()]
        return left, handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))

    assert program(reader, tmp_path, action, ALONE) == ([], True)
    assert [len(rows(tmp_path / f"out-{name}" / "emissions.csv")) for name in ("first", "second")] == [1, 1]
    assert not (tmp_path / ".codecarbon.lock").exists()


def test_each_training_is_measured_and_a_log_line_outside_of_one_is_not(reader, tmp_path):
    def action():
        made = trainer(reader, max_steps=2)
        made.evaluate()
        made.train()
        made.evaluate()
        made.train()

    program(reader, tmp_path, action)
    assert len(rows(tmp_path / "out-first" / "emissions.csv")) == 2


def test_ctrl_c_is_an_interruption_while_the_package_has_its_handlers(reader, tmp_path):
    def action():
        alone(tmp_path)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a fork of a background process lacks
        interrupts = At(3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            trainer(reader, callbacks=(interrupts,), save_on_signal=False).train()

    program(reader, tmp_path, action, ALONE)
    assert len(rows(tmp_path / "out-first" / "emissions.csv")) == 1


def test_a_process_that_a_signal_ends_at_once_leaves_no_lock(reader, tmp_path):
    def action():
        alone(tmp_path)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ends = At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        trainer(reader, callbacks=(ends,), save_on_signal=False).train()

    program(reader, tmp_path, action, ALONE, code=1)  # the package's
    assert not (tmp_path / ".codecarbon.lock").exists()


def test_a_run_that_is_measured_alone_ends_with_a_checkpoint_after_a_signal(reader, tmp_path):
    def action():
        alone(tmp_path)
        trainer(reader, callbacks=(At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)),)).train()

    program(reader, tmp_path, action, ALONE, code=128 + signal.SIGTERM)
    assert (tmp_path / "out-first" / "checkpoint-3" / "manifest.json").is_file()
    assert len(rows(tmp_path / "out-first" / "emissions.csv")) == 1


def test_the_variable_says_where_the_measurement_goes(reader, tmp_path):
    variables = {"CODECARBON_OUTPUT_DIR": str(tmp_path / "elsewhere")}
    program(reader, tmp_path, lambda: trainer(reader, max_steps=2).train() and None, variables)
    assert len(rows(tmp_path / "elsewhere" / "emissions.csv")) == 1
    assert not Path(tmp_path / "out-first" / "emissions.csv").exists()
