"""What `hub_strategy` promises is on the Hub when `train()` returns, or a warning says how to push it later."""

import functools
import json
import os
import shlex
import signal
import threading

import pytest

from local_hub import TOKEN
from trainwright import TrainerCallback
from trainwright.cli import main

pytest.importorskip("huggingface_hub")

from trainwright.hub import push, retry


@pytest.fixture
def pushing(hub, make_trainer):
    """A Trainer of 6 steps that saves after each second one, and pushes where no push runs."""

    def make(strategy="every_save", callbacks=(), **arguments):
        values = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "hub_model_id": "model", **arguments}
        trainer = {"callbacks": list(callbacks)}
        return make_trainer(trainer=trainer, push_to_hub=True, hub_token=TOKEN, hub_strategy=strategy, **values)

    return make


class OpensTheGate(TrainerCallback):
    """The first push is not answered before training has ended."""

    def __init__(self, hub):
        self.hub = hub
        hub.gate.clear()

    def on_train_end(self, args, state, control, **kwargs):
        self.hub.gate.set()


class FailsAt(TrainerCallback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


def step_on_hub(hub):
    return json.loads(hub.files()["last-checkpoint/trainer_state.json"])["global_step"]


def weights(path):
    return (path / "model.safetensors").read_bytes()


def messages(hub):
    return [summary for _, _, summary in hub.commits]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def command_in(caplog):
    """The command that a warning names."""
    (line,) = [text for text in warnings_of(caplog) if "To push them later: " in text]
    return shlex.split(line.partition("To push them later: ")[2])


# -- caught up ---------------------------------------------------------------------------------------------------------


def test_the_last_checkpoint_is_there_although_a_push_ran_during_every_save(hub, pushing, tmp_path):
    pushing("checkpoint", [OpensTheGate(hub)]).train()
    assert step_on_hub(hub) == 6
    assert hub.files()["model.safetensors"] == weights(tmp_path / "out" / "checkpoint-6")
    assert messages(hub) == [f"Training in progress, step {step}" for step in (2, 6)]


def test_all_checkpoints_are_there_although_a_push_ran_during_every_save(hub, pushing):
    pushing("all_checkpoints", [OpensTheGate(hub)]).train()
    found = {path.partition("/")[0] for path in hub.files() if path.startswith("checkpoint-")}
    assert found == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


# With which the first evaluation is the best, since the loss falls.
WORSE_AND_WORSE = {
    "max_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}


def test_the_model_of_the_last_step_is_there_where_no_checkpoint_has_it(hub, pushing, tmp_path):
    trainer = pushing("every_save", save_strategy="best", **WORSE_AND_WORSE)
    trainer.train()
    assert trainer.state.best_global_step < 3
    assert messages(hub)[-1] == "End of training"
    assert hub.files()["model.safetensors"] == weights(tmp_path / "out")


def test_the_final_model_is_there_also_of_a_run_that_saves_no_checkpoint(hub, pushing, tmp_path):
    pushing("checkpoint", save_strategy="no").train()
    assert messages(hub) == ["End of training"]
    assert set(hub.files()) == {"model.safetensors", "training_args.bin", "README.md", "training_curves.svg"}


def test_the_best_model_is_there_where_it_is_loaded_at_the_end_and_the_last_checkpoint_too(hub, pushing, tmp_path):
    trainer = pushing("checkpoint", load_best_model_at_end=True, **WORSE_AND_WORSE)
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 3
    assert hub.files()["model.safetensors"] == weights(tmp_path / "out" / f"checkpoint-{best}")
    assert step_on_hub(hub) == 3


def test_the_average_of_the_weights_is_there_where_it_is_what_training_hands_out(hub, pushing, tmp_path):
    pushing("every_save", ema_decay=0.5).train()
    assert hub.files()["model.safetensors"] == weights(tmp_path / "out")
    assert hub.files()["model.safetensors"] != weights(tmp_path / "out" / "checkpoint-6")


def test_each_push_brings_a_card_with_what_was_measured_so_far(hub, pushing):
    class Reads(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            trainer._hub._queue.wait_until_done()

    trainer = pushing("every_save", [Reads()], eval_strategy="steps", eval_steps=2)
    trainer.train()
    card = hub.files()["README.md"].decode()
    assert "learning_rate: 0.1" in card and "| " in card and "(training_curves.svg)" in card
    assert hub.files()["training_curves.svg"].startswith(b"<svg ")


def test_a_card_that_an_override_cannot_write_costs_a_warning(hub, pushing, caplog):
    trainer = pushing("every_save")
    trainer.create_model_card = lambda **kwargs: 1 / 0
    trainer.train()
    assert "nothing was pushed, and training continues: ZeroDivisionError" in caplog.text
    assert trainer.state.global_step == 6


# -- retried -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503, 504])
def test_an_error_of_the_server_that_passes_costs_nothing(status, hub, pushing, caplog):
    hub.answers = [(status, {}), (status, {"Retry-After": "0"})]
    pushing("checkpoint", max_steps=2).train()
    assert step_on_hub(hub) == 2 and not warnings_of(caplog)


def test_a_push_that_failed_is_made_at_the_end(hub, pushing, caplog):
    class HubIsDown(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer._hub._queue.wait_until_done()
                hub.is_down = True

        def on_train_end(self, args, state, control, **kwargs):
            trainer._hub._queue.wait_until_done()
            before.append(step_on_hub(hub))
            hub.is_down = False

    before = []
    trainer = pushing("checkpoint", [HubIsDown()], hub_always_push=True)
    trainer.train()
    assert before == [2] and step_on_hub(hub) == 6
    assert "To push them later" not in caplog.text


def test_a_lost_connection_is_tried_again(hub, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_commit(self, *args, **kwargs):
            calls.append(kwargs)
            if len(calls) < 3:
                raise ConnectionResetError("the connection was lost")
            return "a commit"

    monkeypatch.setattr(push, "_api", functools.lru_cache(lambda token: Api()))
    (tmp_path / "file").write_text("")
    assert push.push_folder("me/model", str(tmp_path), message="m") == "a commit" and len(calls) == 3


# -- a Hub that is away ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_a_hub_that_is_down_for_the_whole_run_costs_a_warning_whose_command_pushes_later(
    strategy, hub, pushing, tmp_path, caplog, monkeypatch, capsys
):
    hub.is_down = True
    trainer = pushing(strategy, hub_revision="try-2", hub_private_repo=True)
    result = trainer.train()
    assert result.global_step == 6 and hub.commits == []
    assert "The Hub cannot be reached" in warnings_of(caplog)[0]
    command = command_in(caplog)
    assert not list((tmp_path / "out").glob(".hub-push*"))
    hub.is_down = False
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert command[0] == "trainwright" and main(command[1:]) == 0
    assert f"{hub.url}/me/model/commit/" in capsys.readouterr().out
    files = hub.files(branch="try-2")
    assert files["model.safetensors"] == weights(tmp_path / "out" / "checkpoint-6") and hub.private
    assert ("last-checkpoint/optimizer.pt" in files) == (strategy == "checkpoint")
    assert ("checkpoint-4/optimizer.pt" in files) == (strategy == "all_checkpoints")


def test_the_repository_is_made_when_the_hub_is_back(hub, pushing):
    class HubIsBack(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            hub.is_down = False

    hub.is_down = True
    trainer = pushing("every_save", [HubIsBack()])
    assert trainer.hub_model_id == "model" and hub.repositories == {}
    trainer.train()
    assert trainer.hub_model_id == "me/model" and "model.safetensors" in hub.files()


def test_a_push_by_hand_to_a_hub_that_is_down_is_an_error_with_the_command_and_the_model_is_saved(
    hub, pushing, tmp_path, monkeypatch
):
    trainer = pushing("end")
    trainer.train()
    hub.is_down = True
    with pytest.raises(
        RuntimeError, match=r"To push them later: trainwright push .* --repo me/model --strategy end"
    ) as e:
        trainer.push_to_hub()
    hub.is_down = False
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(shlex.split(str(e.value).partition("later: ")[2])[1:]) == 0
    assert hub.files()["model.safetensors"] == weights(tmp_path / "out")


def test_saving_the_model_by_hand_while_the_hub_is_down_is_a_warning(hub, pushing, tmp_path, caplog):
    trainer = pushing("end")
    hub.is_down = True
    trainer.save_model()
    assert command_in(caplog)[:2] == ["trainwright", "push"] and (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("status", "cure"), [(401, "hf auth login"), (403, "may not write to model"), (404, "check hub_model_id")]
)
def test_what_the_hub_refuses_is_an_error_before_training_that_names_the_cure(status, cure, hub, pushing):
    hub.denied = {"/api/repos/create": status}
    with pytest.raises(RuntimeError, match=cure):
        pushing("every_save")
    assert sum(path == "/api/repos/create" for _, path, _, _ in hub.requests) == 1  # not retried


@pytest.mark.parametrize(("status", "cure"), [(401, "hf auth login"), (403, "may not write to me/model")])
def test_a_push_that_is_refused_is_tried_once_for_each_save_and_named_with_its_cure(status, cure, hub, pushing, caplog):
    hub.denied = {"/commit/": status}
    trainer = pushing("every_save", hub_always_push=True)
    trainer.train()
    assert trainer.state.global_step == 6
    assert sum("/commit/" in path for _, path, _, _ in hub.requests) == 3
    last = warnings_of(caplog)[-1]
    assert cure in last and "trainwright push" in last and TOKEN not in caplog.text


def test_a_run_of_somebody_who_has_not_logged_in_is_an_error_before_training(hub, make_trainer, monkeypatch):
    import huggingface_hub

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(RuntimeError, match="hf auth login"):
        make_trainer(push_to_hub=True)
    assert hub.requests == []


# -- runs that do not end well -----------------------------------------------------------------------------------------


def test_a_run_that_fails_has_pushed_its_last_checkpoint(hub, pushing):
    hub.gate.clear()
    threading.Timer(0.3, hub.gate.set).start()
    with pytest.raises(RuntimeError, match="a crash"):
        pushing("checkpoint", [FailsAt(5, RuntimeError("a crash"))]).train()
    assert step_on_hub(hub) == 4


def test_ctrl_c_waits_for_no_push_and_says_what_to_do(hub, pushing, caplog, tmp_path):
    hub.gate.clear()
    with pytest.raises(KeyboardInterrupt):
        pushing("checkpoint", [FailsAt(5, KeyboardInterrupt())]).train()
    assert hub.commits == []
    assert command_in(caplog)[1:3] == ["push", str(tmp_path / "out")]
    hub.gate.set()


def test_a_run_that_a_signal_ends_pushes_its_checkpoint_without_waiting_for_retries(hub, pushing, monkeypatch):
    class Signals(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(retry, "RETRY_DELAYS_S", (1000,))
    with pytest.raises(SystemExit):
        pushing("checkpoint", [Signals()]).train()
    assert step_on_hub(hub) == 3
    hub.is_down = True
    with pytest.raises(SystemExit):
        pushing("checkpoint", [Signals()]).train()


def test_a_second_run_pushes_again(hub, pushing):
    trainer = pushing("checkpoint", [callback := FailsAt(5, KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(callback)
    trainer.train()
    assert step_on_hub(hub) == 6


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_pushes_the_model_of_the_newest_checkpoint_where_nothing_else_is_there(
    hub, make_trainer, tmp_path, monkeypatch, capsys
):
    make_trainer(max_steps=4, save_strategy="steps", save_steps=2).train()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", str(tmp_path / "out")]) == 0
    assert hub.files("me/out")["model.safetensors"] == weights(tmp_path / "out" / "checkpoint-4")
    assert "optimizer.pt" not in hub.files("me/out")


def test_the_command_pushes_the_model_in_the_directory_where_it_is_the_newer_one(
    hub, make_trainer, tmp_path, monkeypatch
):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    with __import__("torch").no_grad():
        trainer.model.linear.weight.add_(1)
    trainer.save_model()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for strategy in ([], ["--strategy", "checkpoint"]):
        assert main(["push", str(tmp_path / "out"), "--repo", "acme/line", *strategy]) == 0
        assert hub.files("acme/line")["model.safetensors"] == weights(tmp_path / "out")
    assert "last-checkpoint/optimizer.pt" in hub.files("acme/line")


def test_the_command_says_what_is_missing(hub, tmp_path, monkeypatch, capsys, make_trainer):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", str(tmp_path)]) == 1
    assert "holds no model, nor a checkpoint" in capsys.readouterr().err
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    assert main(["push", str(tmp_path / "out"), "--strategy", "end"]) == 1
    assert "--strategy every_save pushes that of" in capsys.readouterr().err
    hub.denied = {"/api/repos/create": 401}
    assert main(["push", str(tmp_path / "out")]) == 1
    assert "hf auth login" in capsys.readouterr().err
