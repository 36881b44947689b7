"""Where messages are shown: on stderr where nothing else shows them, from the level that was asked for."""

import io
import logging
import subprocess
import sys

import pytest
from tqdm import tqdm

from trainwright import log_output
from trainwright.log_output import show_messages

LOGGER = logging.getLogger("trainwright.somewhere")

PROGRAM = """
import logging, sys
import torch, trainwright
from trainwright import Trainer, TrainingArguments

library = logging.getLogger("trainwright")
print("imported:", library.handlers, library.level, logging.getLogger().handlers)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x):
        return {"loss": (self.weight - x).square().mean()}

def train(**arguments):
    args = TrainingArguments(sys.argv[1], max_steps=1, report_to="none", use_cpu=True, save_strategy="no", **arguments)
    Trainer(Model(), args, train_dataset=[{"x": torch.ones(1)}] * 2).train()

train()
print("passive:", library.level)
train(log_level="info")
train(log_level="error")
logging.basicConfig(stream=sys.stdout, format="basicConfig %(name)s %(message)s", level=logging.INFO)
train(log_level="info")
"""


def test_a_program_without_logging_sees_what_log_level_asks_for_and_with_basicconfig_sees_it_once(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "imported: [] 0 []" in done.stdout  # importing configures nothing
    assert "passive: 0" in done.stdout  # and a Trainer without log_level changes no level
    assert done.stderr.count("[trainwright] INFO: Running training: 2 samples") == 1
    assert done.stdout.count("basicConfig trainwright.trainer Running training: 2 samples") == 1


@pytest.fixture
def unconfigured(monkeypatch):
    """Call it for a program that configured no logging: pytest puts handlers on the root logger when a test begins."""
    library = logging.getLogger("trainwright")
    before = library.level

    def take_handlers_away():
        for logger in (logging.getLogger(), library):
            monkeypatch.setattr(logger, "handlers", [])

    yield take_handlers_away
    library.setLevel(before)


@pytest.mark.parametrize(("level", "shown"), [(logging.INFO, ["info", "error"]), (logging.ERROR, ["error"])])
def test_messages_are_shown_from_the_level_on(unconfigured, capsys, level, shown):
    unconfigured()
    show_messages(level)
    LOGGER.debug("debug")
    LOGGER.info("info")
    LOGGER.error("error")
    assert [line.rpartition(": ")[2] for line in capsys.readouterr().err.splitlines()] == shown


def test_no_level_leaves_the_level_as_it_is(unconfigured, capsys):
    unconfigured()
    logging.getLogger("trainwright").setLevel(logging.DEBUG)
    show_messages(None)
    LOGGER.debug("still shown")
    assert capsys.readouterr().err == "[trainwright] DEBUG: still shown\n"


def test_two_trainers_show_a_message_once(unconfigured, capsys):
    unconfigured()
    show_messages(logging.INFO)
    show_messages(logging.INFO)
    LOGGER.info("once")
    assert capsys.readouterr().err.count("once") == 1


@pytest.mark.parametrize("name", ["", "trainwright"])
@pytest.mark.parametrize("is_before", [True, False])
def test_a_handler_of_the_program_alone_shows_a_message(unconfigured, capsys, name, is_before):
    unconfigured()
    theirs = io.StringIO()
    if not is_before:
        show_messages(logging.INFO)
    logging.getLogger(name).addHandler(logging.StreamHandler(theirs))
    if is_before:
        show_messages(logging.INFO)
    LOGGER.info("a message")
    assert (theirs.getvalue(), capsys.readouterr().err) == ("a message\n", "")


@pytest.mark.parametrize("handler", [logging.NullHandler(), logging.StreamHandler(io.StringIO())])
def test_a_handler_that_does_not_show_this_level_hides_no_message(unconfigured, capsys, handler):
    unconfigured()
    handler.setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(handler)
    show_messages(logging.INFO)
    LOGGER.warning("a message")
    assert capsys.readouterr().err == "[trainwright] WARNING: a message\n"


def test_a_handler_on_the_root_counts_only_where_messages_reach_it(unconfigured, capsys, monkeypatch):
    unconfigured()
    monkeypatch.setattr(logging.getLogger("trainwright"), "propagate", False)
    logging.getLogger().addHandler(logging.StreamHandler(io.StringIO()))
    show_messages(logging.INFO)
    LOGGER.info("a message")
    assert "a message" in capsys.readouterr().err


def test_a_progress_bar_is_cleared_before_a_message_and_drawn_again_after_it(unconfigured, capsys):
    unconfigured()
    show_messages(logging.INFO)
    with tqdm(total=2, file=sys.stderr, desc="bar", ascii=True, mininterval=0) as bar:
        bar.update(1)
        LOGGER.info("a message")
        shown = capsys.readouterr().err
    before, _, after = shown.partition("[trainwright] INFO: a message\n")
    assert before.endswith("\r") and before.rstrip("\r").endswith(" ")  # the line of the bar was overwritten
    assert after.startswith("\rbar:")


def test_without_stderr_nothing_is_shown_and_nothing_fails(unconfigured, monkeypatch):
    unconfigured()
    show_messages(logging.INFO)
    monkeypatch.setattr(sys, "stderr", None)
    LOGGER.info("a message")


def test_the_level_is_that_of_the_library_whose_verbosity_is_followed(unconfigured, monkeypatch):
    unconfigured()
    monkeypatch.setattr(log_output, "library", "another")
    show_messages(logging.DEBUG)
    assert logging.getLogger("another").level == logging.DEBUG != logging.getLogger("trainwright").level
