"""Features that meet: each pair gives what its parts give, is resumed to the bit, or is refused with one error.

A run that saves beside the training is compared with one that waits for its saves: same files, same end. It is then
ended by a signal and resumed. The parts themselves are tested where they are owned.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from trainwright import TrainerCallback
from trainwright.checkpoint import writer
from trainwright.checkpoint.manifest import problems

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from runs import LineData, LineModel, difference, end_of, forked_writer, make_run

STEPS, SAVED = 6, (2, 4, 6)
FILES = ("model.safetensors", "adapter_model.safetensors", "ema.safetensors", "optimizer.pt", "scheduler.pt")
NUM_FITTING = 2  # rows that the device of `SmallDevice` has room for
NAN_SAMPLE = 7


class SmallDevice(LineModel):
    """Runs out of memory with more than NUM_FITTING rows in training."""

    def forward(self, x, labels=None):
        if self.training and len(x) > NUM_FITTING:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x, labels)


class OneNaN(LineData):
    """One sample makes the loss NaN."""

    def __init__(self):
        super().__init__()
        self.y[NAN_SAMPLE] = float("nan")


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["linear"], r=2))


FEATURES = {
    "ema_decay": {"ema_decay": 0.75, "ema_start_step": 1},
    "optimizer_in_backward": {"optimizer_in_backward": True, "max_grad_norm": 0},
    "schedule_free": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
    "load_best_model_at_end": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
    "nonfinite": {"nonfinite": "rollback"},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "watched": {"time_breakdown": "logs", "log_speed": True, "profile_steps": "2-3"},
    "learning_rate_per_module": {"learning_rate_per_module": {".*linear.*": 0.03}},
    "peft": {},
}
REFUSED = {  # pairs that cannot work, and what the error must name
    ("ema_decay", "schedule_free"): "ema_decay",
    ("optimizer_in_backward", "schedule_free"): "optimizer_in_backward=True cannot work",
    ("optimizer_in_backward", "auto_find_batch_size"): "changes weights during the backward pass",
}
PAIRS = list(itertools.combinations(FEATURES, 2))


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    monkeypatch.setattr(writer, "launch", forked_writer())


class Signal(TrainerCallback):
    """Sends this process SIGTERM after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def run(out, features, **options):
    """A Trainer with these features; not yet trained."""
    if "schedule_free" in features:
        pytest.importorskip("schedulefree")
    model = SmallDevice(dropout=0.5) if "auto_find_batch_size" in features else LineModel(dropout=0.5)
    given = {"model": adapted(model) if "peft" in features else model}
    if "nonfinite" in features:
        given["train_dataset"] = OneNaN()
    values = {"max_steps": STEPS, "save_steps": 2, "async_save": True}
    for feature in features:
        values |= FEATURES[feature]
    callbacks = options.pop("callbacks", [])
    return make_run(out, {**given, "callbacks": callbacks}, **(values | options))


def without_times(end):
    log = [{name: value for name, value in line.items() if not name.startswith("time_")} for line in end["log"]]
    return {**end, "log": log}


def check_same(expected, found):
    assert difference(without_times(expected), without_times(found)) == ""


def files_of(out, step):
    directory = Path(out, f"checkpoint-{step}")
    assert problems(directory) == []
    return {name: (directory / name).read_bytes() for name in FILES if (directory / name).exists()}


@pytest.mark.parametrize("features", [(one,) for one in FEATURES] + PAIRS, ids="+".join)
def test_saves_beside_the_training_and_a_resume_change_nothing(tmp_path, features):
    if features in REFUSED:
        with pytest.raises((ValueError, torch.OutOfMemoryError), match=REFUSED[features]):
            run(tmp_path / "refused", features).train()
        return
    waited = run(tmp_path / "waited", features, async_save=False)
    waited.train()
    beside = run(tmp_path / "beside", features)
    beside.train()
    check_same(end_of(waited), end_of(beside))
    for step in SAVED:
        assert files_of(tmp_path / "beside", step) == files_of(tmp_path / "waited", step)
    assert ("ema.safetensors" in files_of(tmp_path / "beside", 2)) == ("ema_decay" in features)

    # A schedule-free optimizer computes the weights to save from those it trains, and back, which rounds: only a save
    # that the whole run makes as well leads to the same end.
    cut = 4 if "schedule_free" in features else 3
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", features, callbacks=[Signal(cut)]).train()
    assert problems(tmp_path / "cut" / f"checkpoint-{cut}") == []
    resumed = run(tmp_path / "cut", features)
    resumed.train(resume_from_checkpoint=True)
    check_same(end_of(waited), end_of(resumed))
    assert files_of(tmp_path / "cut", STEPS) == files_of(tmp_path / "waited", STEPS)
