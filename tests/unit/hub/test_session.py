"""A Trainer with `push_to_hub=True` and the real huggingface_hub, to the small Hub of `tests/shared/local_hub.py`."""

import json
import logging
from pathlib import Path

import pytest

from local_hub import TOKEN

pytest.importorskip("huggingface_hub")

SAVED = {"model.safetensors", "training_args.bin"}
CARD = {"README.md", "training_curves.svg"}
RESUME = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "loop_state.json", "manifest.json"}


@pytest.fixture
def pushing(hub, make_trainer):
    """A Trainer of 3 steps that saves after each and pushes, waiting for each push so that the test can count them."""

    def make(strategy="every_save", **arguments):
        values = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "hub_model_id": "model", **arguments}
        return make_trainer(push_to_hub=True, hub_token=TOKEN, hub_strategy=strategy, hub_always_push=True, **values)

    return make


def messages(hub):
    return [summary for _, _, summary in hub.commits]


def test_the_repository_is_made_at_construction_under_the_name_of_the_arguments(hub, pushing):
    trainer = pushing(hub_private_repo=True)
    assert trainer.hub_model_id == "me/model" and list(hub.repositories) == ["me/model"] and hub.private
    assert hub.commits == []


def test_the_output_directory_names_the_repository_where_nothing_else_does(hub, pushing, tmp_path):
    assert pushing(hub_model_id=None, output_dir=str(tmp_path / "my-line")).hub_model_id == "me/my-line"


def test_strategy_end_pushes_only_when_told_and_brings_model_and_card(hub, pushing):
    trainer = pushing("end")
    trainer.train()
    assert hub.commits == []
    commit = trainer.push_to_hub()
    assert messages(hub) == ["End of training"] and commit.commit_url.startswith(hub.url)
    assert set(hub.files()) == SAVED | CARD
    assert hub.files()["model.safetensors"] == (Path(trainer.args.output_dir) / "model.safetensors").read_bytes()
    assert "learning_rate: 0.1" in hub.files()["README.md"].decode()


def test_strategy_every_save_pushes_the_model_after_each_save(hub, pushing):
    trainer = pushing("every_save")
    trainer.train()
    assert messages(hub) == [f"Training in progress, step {step}" for step in (1, 2, 3)]
    assert set(hub.files()) == SAVED | CARD
    last = Path(trainer.args.output_dir) / "checkpoint-3" / "model.safetensors"
    assert hub.files()["model.safetensors"] == last.read_bytes()


def test_strategy_checkpoint_also_keeps_the_last_checkpoint_from_which_training_resumes(hub, pushing, tmp_path):
    trainer = pushing("checkpoint", save_total_limit=1)
    trainer.train()
    assert set(hub.files()) == SAVED | CARD | {f"last-checkpoint/{name}" for name in SAVED | RESUME}
    state = json.loads(hub.files()["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 3
    downloaded = tmp_path / "downloaded" / "checkpoint-3"
    downloaded.mkdir(parents=True)
    for name in SAVED | RESUME:
        (downloaded / name).write_bytes(hub.files()[f"last-checkpoint/{name}"])
    again = pushing("end", max_steps=4, output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(downloaded))
    assert again.state.global_step == 4 and len(again.state.log_history) == len(trainer.state.log_history) + 1


def test_strategy_all_checkpoints_keeps_each_under_its_own_name(hub, pushing):
    pushing("all_checkpoints").train()
    expected = {f"checkpoint-{step}/{name}" for step in (1, 2, 3) for name in SAVED | RESUME}
    assert set(hub.files()) == SAVED | CARD | expected


def test_saving_the_model_by_hand_pushes_it_to_the_revision_of_the_arguments(hub, pushing):
    pushing("end", hub_revision="try-2").save_model()
    assert hub.commits == [("me/model", "try-2", "Model save")]
    assert set(hub.files(branch="try-2")) == SAVED | {"README.md"} and hub.files(branch="main") == {}


def test_a_push_by_hand_may_name_message_revision_and_what_the_card_says(hub, pushing):
    trainer = pushing("end")
    trainer.push_to_hub("Look at this", revision="try-3", language="en", tags=["line"], model_name="My line")
    assert hub.commits == [("me/model", "try-3", "Look at this")]
    card = hub.files(branch="try-3")["README.md"].decode()
    assert "# My line" in card and "- line" in card and "en" in card


def test_a_push_that_does_not_block_gives_a_future(hub, pushing):
    trainer = pushing("end")
    hub.gate.clear()
    job = trainer.push_to_hub(blocking=False)
    assert not job.done() and hub.commits == []
    hub.gate.set()
    job.result(60)
    assert messages(hub) == ["End of training"]


def test_the_end_of_training_waits_for_the_push_in_progress(hub, pushing):
    from trainwright import TrainerCallback

    class OpensTheGate(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            before.extend(hub.commits)
            hub.gate.set()

    before = []
    hub.gate.clear()  # no commit is answered before training has ended
    trainer = pushing("every_save", max_steps=1)
    trainer.add_callback(OpensTheGate)
    trainer.train()
    assert before == [] and messages(hub) == ["Training in progress, step 1"]


def test_callbacks_hear_of_each_push(hub, pushing):
    from trainwright import TrainerCallback

    class Hears(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            heard.append(state.global_step)

    heard = []
    trainer = pushing("every_save")
    trainer.add_callback(Hears)
    trainer.train()
    trainer.push_to_hub()
    assert heard == [1, 2, 3, 3]


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_the_token_is_written_nowhere(hub, pushing, strategy, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))
    with caplog.at_level(logging.DEBUG, logger="trainwright"):
        trainer = pushing(strategy)
        trainer.train()
        trainer.save_state()
        trainer.push_to_hub()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert (
        TOKEN not in caplog.text and TOKEN not in repr(trainer.args) and TOKEN not in json.dumps(trainer.args.to_dict())
    )
    pushed = [*hub.objects.values(), *(body for _, _, _, body in hub.requests)]
    assert not any(TOKEN.encode() in content for content in pushed)
    assert all(header == f"Bearer {TOKEN}" for _, path, header, _ in hub.requests if path.startswith("/api"))
