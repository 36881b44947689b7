"""Flyte: inside a task, with its checkpoint and its Decks, and outside of one."""

from __future__ import annotations

from pathlib import Path

import pytest

import battery
from scenarios import At, fail, trainer
from trainwright.interop.trackers import TRACKERS
from trainwright.tracking.flyte import FlyteCallback, log_history_table

pytestmark = pytest.mark.xdist_group("flyte")


class Reader(battery.Reader):
    """Nothing is stored that could be read back: a task has what it has while it runs."""

    name = "flyte"
    distribution = "flytekit"


@pytest.fixture
def reader():
    row = TRACKERS["flyte"]
    if row.missing and Reader.distribution in battery.group():
        pytest.fail(f"{row.missing} is in the requirements of this group and is not installed")
    if row.missing:
        pytest.skip(f"needs {row.missing}: make test-trackers, or pip install 'trainwright[{row.extra}]' elsewhere")
    return Reader()


def in_task(action):
    """What `action()` returns in a Flyte task."""
    from flytekit import task

    found = []

    @task(enable_deck=True)
    def train() -> int:
        found.append(action())
        return len(found)

    assert train() == 1
    return found[0]


def decks():
    from flytekit import current_context

    return {deck.name: deck.html for deck in current_context().decks}


def test_in_a_task_checkpoints_are_synced_the_history_is_a_deck_and_a_training_resumes(reader, tmp_path):
    def task():
        from flytekit import current_context

        made = trainer(reader)
        made.train()
        checkpoint = current_context().checkpoint
        saved = {path.name for path in Path(checkpoint._checkpoint_dest).rglob("*.*")}
        return saved, decks()["Log History"], made.state.log_history, made.callback_handler.callbacks[1]._switched_off

    saved, deck, history, is_off = battery.program(reader, tmp_path, lambda: in_task(task))
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= saved and not is_off
    assert log_history_table(history) in deck and f"<td>{history[0]['loss']}</td>" in deck


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_a_training_that_does_not_come_to_its_end_shows_what_it_logged(error, reader, tmp_path):
    def task():
        made = trainer(reader, callbacks=(At(3, fail(error)),))
        with pytest.raises(type(error)):
            made.train()
        return decks()["Log History"], made.state.log_history

    deck, history = battery.program(reader, tmp_path, lambda: in_task(task))
    assert len([line for line in history if "loss" in line]) == 3 and log_history_table(history) in deck


def test_each_part_can_be_left_out(reader, tmp_path):
    def task():
        from flytekit import current_context

        reader.constructor = {"save_log_history": False, "sync_checkpoints": False}
        trainer(reader).train()
        destination = Path(current_context().checkpoint._checkpoint_dest)
        return "Log History" in decks(), destination.exists() and any(destination.rglob("*.*"))

    assert battery.program(reader, tmp_path, lambda: in_task(task)) == (False, False)


def test_outside_of_a_task_it_is_explained_and_trains_without_checkpoints(reader, tmp_path):
    def action():
        with pytest.raises(RuntimeError, match="within a Flyte task only"):
            trainer(reader).train()
        made = trainer(reader, "second", (FlyteCallback(sync_checkpoints=False),), report_to="none")
        made.train()
        return made.state.log_history, decks()

    history, found = battery.program(reader, tmp_path, action)
    assert log_history_table(history) in found["Log History"]
