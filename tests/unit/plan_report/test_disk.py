"""The disk that checkpoints need, compared with what a run wrote."""

import os

import pytest
import torch
from torch import nn

from trainwright import Trainer

SMALL_FILES = 64 << 10  # generators, arguments, states, manifest


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(3, 60_000), nn.Linear(60_000, 1)

    def forward(self, x, labels=None):
        return {"loss": ((self.outer(self.inner(x)) - labels) ** 2).mean()}


def bytes_under(path):
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


@pytest.mark.parametrize("arguments", [{}, {"save_only_model": True}, {"ema_decay": 0.9, "optim": "sgd"}])
def test_a_checkpoint_is_as_large_as_planned(make_trainer, tmp_path, arguments):
    trainer = make_trainer(trainer={"model": Wide()}, max_steps=1, save_strategy="steps", save_steps=1, **arguments)
    planned = trainer.plan_report().as_dict()["disk"]
    assert os.listdir(tmp_path / "out") == []
    trainer.train()
    written = bytes_under(tmp_path / "out" / "checkpoint-1")
    assert 0 < written - planned["checkpoint_bytes"] < SMALL_FILES + 0.02 * written
    assert planned["needed_bytes"] == planned["checkpoint_bytes"] > 10 * SMALL_FILES


def test_as_many_checkpoints_lie_there_at_once_as_planned(make_trainer, tmp_path):
    class Watched(Trainer):
        found = 0

        def _rotate_checkpoints(self, use_mtime=False, output_dir=None):
            there = [name for name in os.listdir(output_dir) if name.startswith("checkpoint-")]
            self.found = max(self.found, len(there))
            super()._rotate_checkpoints(use_mtime, output_dir)

    arguments = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = make_trainer(cls=Watched, **arguments)
    planned = trainer.plan_report().as_dict()["disk"]
    trainer.train()
    assert planned["checkpoints"] == 5 and planned["checkpoints_at_once"] == trainer.found == 3
    assert planned["needed_bytes"] == 3 * planned["checkpoint_bytes"]


def test_a_run_that_saves_nothing_needs_no_disk(make_trainer):
    report = make_trainer(max_steps=2, save_strategy="no").plan_report()
    assert report.as_dict()["disk"] is None
    assert "never" in next(line for line in report.text.splitlines() if line.strip().startswith("saved"))


def test_a_disk_without_room_is_a_warning(make_trainer, monkeypatch):
    from trainwright.plan_report import disk

    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 10)
    assert any("10 B are free" in text and "save_total_limit" in text for text in trainer.plan_report().warnings)
