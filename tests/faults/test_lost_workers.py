"""Loader workers that die or hang while a run goes on."""

import os
import signal
import time

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from trainwright import Trainer, TrainingArguments
from trainwright.data.worker_recovery import WorkerLost


class Faulty(Dataset):
    """Random samples; `fault(index)` is called in the worker before each."""

    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.fault(index)
        return {"x": torch.rand(3), "labels": torch.tensor([index / 24])}


class FaultyLarge(Faulty):
    """Samples whose batches come as file descriptors, which a worker that is gone cannot pass on."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "unused": torch.rand(2**15)}


class FaultyStream(IterableDataset):
    def __init__(self, fault):
        self.fault = fault

    def __iter__(self):
        for index in range(24):
            self.fault(index)
            yield {"x": torch.rand(3), "labels": torch.tensor([index / 24])}


def never(index):
    pass


def once(path, what, at=13):
    """`what()` in the worker that makes sample `at`, the first time only, in all processes together."""

    def fault(index):
        if index == at and not path.exists():
            path.touch()
            what()

    return fault


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(600)  # until the loader gives the worker up


class LeavesOut(nn.Module):
    """A model that is given inputs it has no use for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels, unused=None):
        return self.model(x, labels)


def run(model, directory, dataset, **arguments):
    values = {
        "output_dir": str(directory),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": 1,
        "max_steps": 9,
        "logging_steps": 1,
        "learning_rate": 0.05,
        **arguments,
    }
    trainer = Trainer(LeavesOut(model), TrainingArguments(**values), train_dataset=dataset)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, list(model.state_dict().values())


@pytest.mark.parametrize("kind", [Faulty, FaultyLarge, FaultyStream])
@pytest.mark.parametrize("what, options", [(die, {}), (hang, {"dataloader_timeout": 1.0})], ids=["dies", "hangs"])
def test_a_lost_worker_leaves_no_trace_in_the_run(line_model, tmp_path, caplog, kind, what, options):
    whole = run(line_model(dropout=0.2), tmp_path, kind(never))
    faulty = run(line_model(dropout=0.2), tmp_path, kind(once(tmp_path / "happened", what)), **options)
    assert (tmp_path / "happened").exists()
    assert faulty[0] == whole[0]
    assert all(map(torch.equal, faulty[1], whole[1]))
    assert "A loader worker was lost" in caplog.text


def test_a_sample_that_always_kills_its_worker_is_named(line_model, tmp_path):
    def fault(index):
        if index == 13:
            die()

    with pytest.raises(WorkerLost, match=r"4 times.*samples 12 to 15 of epoch 0.*\[12, 13, 14, 15\]"):
        run(line_model(), tmp_path, Faulty(fault), train_sampling_strategy="sequential")


def test_an_error_of_the_data_set_is_not_tried_again(line_model, tmp_path):
    calls = tmp_path / "calls"

    def fault(index):
        if index == 13:
            with calls.open("a") as file:
                file.write("x")
            raise KeyError("no such sample")

    with pytest.raises(KeyError, match="no such sample"):
        run(line_model(), tmp_path, Faulty(fault), train_sampling_strategy="sequential")
    assert calls.read_text() == "x"
