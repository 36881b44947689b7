"""Features that meet: each pair gives what its parts give, is resumed to the bit, or is refused with one error.

A run that saves beside the training is compared with one that waits for its saves: same files, same end. It is then
ended by a signal and resumed. The parts themselves are tested where they are owned.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainwright import TrainerCallback
from trainwright.checkpoint import writer
from trainwright.checkpoint.manifest import problems

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from runs import difference, end_of, forked_writer

from configurations import FEATURES, NEEDED, PAIRS, REFUSED, STEPS, make_run, run_with
from line import LineModel

SAVED = (2, 4, 6)
FILES = ("model.safetensors", "adapter_model.safetensors", "ema.safetensors", "optimizer.pt", "scheduler.pt")
NUM_PACKS = 4


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
    """`run_with`, or a skipped test where a package is missing."""
    for feature in features:
        if feature in NEEDED:
            pytest.importorskip(NEEDED[feature])
    return run_with(out, features, **options)


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


# ------------------------------------------------------------------------------------------------------------- packing


class Mixer(torch.nn.Module):
    """Predicts the next token from the mean of those of its sample so far; `num_fitting` packs fit into its device."""

    accepts_loss_kwargs = True

    def __init__(self, num_fitting=NUM_PACKS):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64)
        self.num_fitting = num_fitting

    def forward(self, input_ids, labels, seq_idx, attention_mask, num_items_in_batch=None):
        if self.training and len(input_ids) > self.num_fitting:
            raise torch.OutOfMemoryError("out of memory")
        same = (seq_idx[:, :, None] == seq_idx[:, None, :]).tril().float()  # (packs, length, length)
        logits = self.head(same @ self.embed(input_ids) / same.sum(-1, keepdim=True))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": loss / (num_items_in_batch or (labels != -100).sum())}


def packed_run(out, model=None, **options):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 64, (2 + index * 7 % 13,), generator=generator) for index in range(24)]
    values = {"packing": True, "packing_length": 16, "per_device_train_batch_size": NUM_PACKS, "save_steps": 3}
    trainer = {"model": model or Mixer(), "train_dataset": [{"input_ids": row} for row in rows]}
    return make_run(out, trainer, **(values | {"num_train_epochs": 2, "async_save": True} | options))


@pytest.mark.parametrize(
    "options",
    [{}, {"neftune_noise_alpha": 5.0}, {"ema_decay": 0.75}, {"log_speed": True, "time_breakdown": "logs"}],
    ids=lambda options: "+".join(options) or "alone",
)
def test_packs_go_on_to_the_bit_with_another_number_of_workers(tmp_path, options):
    whole = packed_run(tmp_path / "whole", **options)
    whole.train()
    assert whole.state.global_step > 3
    for workers in (0, 2):
        resumed = packed_run(tmp_path / f"again-{workers}", dataloader_num_workers=workers, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        check_same(end_of(whole), end_of(resumed))


def test_packs_that_do_not_fit_at_once_are_run_in_parts_and_the_checkpoint_remembers(tmp_path):
    whole = packed_run(tmp_path / "whole")
    whole.train()
    small = packed_run(tmp_path / "small", Mixer(num_fitting=1), auto_find_batch_size=True)
    small.train()
    for name, weight in whole.model.state_dict().items():
        assert torch.allclose(small.model.state_dict()[name], weight, atol=1e-5)
    saved = json.loads((tmp_path / "small" / "checkpoint-3" / "loop_state.json").read_text())["batch_size"]
    assert saved == {"asked": NUM_PACKS, "micro_batch": NUM_PACKS, "at_once": [1]}


def test_tokens_per_second_count_the_tokens_of_packs_without_padding_where_that_is_asked_for(tmp_path):
    counts = {}
    for mode in ("all", "non_padding"):
        trainer = packed_run(tmp_path / mode, include_num_input_tokens_seen=mode, log_speed=True, num_train_epochs=1)
        trainer.train()
        assert all("tokens_per_second" in line for line in trainer.state.log_history if "loss" in line)
        counts[mode] = trainer.state.num_input_tokens_seen
    rows = trainer.train_dataset
    num_packs = len(trainer.get_train_dataloader().dataset)
    assert counts == {"all": 16 * num_packs, "non_padding": sum(len(row["input_ids"]) for row in rows)}
    assert counts["non_padding"] < counts["all"]


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_packs_are_not_ordered_by_length(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"packing=True .* train_sampling_strategy='{strategy}'"):
        packed_run(tmp_path, train_sampling_strategy=strategy)


# ------------------------------------------------------------------------------------ what is handed out in the middle


class Calling(TrainerCallback):
    """Calls `action(trainer)` after step 4, before its checkpoint is written."""

    def __init__(self, action):
        self.action, self.trainer = action, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.action(self.trainer)


def calling(out, features, action, **options):
    callback = Calling(action)
    callback.trainer = run(out, features, callbacks=[callback], **options)
    callback.trainer.train()
    return callback.trainer


@pytest.mark.parametrize("feature", ["schedule_free", "ema_decay"])
def test_a_model_merged_in_the_middle_of_training_has_the_weights_that_are_judged(tmp_path, feature):
    calling(tmp_path / "out", (feature, "peft"), lambda trainer: trainer.save_merged_model(str(tmp_path / "merged")))
    name = "ema" if feature == "ema_decay" else "adapter_model"
    saved = load_file(tmp_path / "out" / "checkpoint-4" / f"{name}.safetensors")
    a, b = (next(value for key, value in saved.items() if part in key) for part in ("lora_A", "lora_B"))
    base = LineModel().linear.weight
    merged = load_file(tmp_path / "merged" / "model.safetensors")["linear.weight"]
    torch.testing.assert_close(merged, base + 4.0 * b @ a, rtol=1e-5, atol=1e-5)  # lora_alpha 8 over rank 2


class OnEvaluation(TrainerCallback):
    """Writes what a search engine keeps, where the loop reports an evaluation to one."""

    def __init__(self, directory):
        self.directory, self.trainer = str(directory), None

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.trainer._tune_save_checkpoint(self.directory)


@pytest.mark.parametrize("feature", ["ema_decay", "schedule_free", "learning_rate_per_module", "auto_find_batch_size"])
def test_a_trial_goes_on_to_the_bit_from_what_a_search_engine_kept(tmp_path, feature):
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "async_save": False}
    callback = OnEvaluation(tmp_path / "kept")
    callback.trainer = whole = run(tmp_path / "whole", (feature,), callbacks=[callback], **evaluating)
    whole.train()
    resumed = run(tmp_path / "again", (feature,), **evaluating)
    resumed.train(resume_from_checkpoint=str(tmp_path / "kept" / "checkpoint-4"))
    check_same(end_of(whole), end_of(resumed))
    if feature == "ema_decay":
        for name, average in whole._average.state_dict().items():
            assert torch.equal(resumed._average.state_dict()[name], average)


def test_a_search_saves_each_trial_beside_its_training_with_its_average(tmp_path):
    pytest.importorskip("optuna")

    def search(out, async_save):
        given = {"model": None, "model_init": lambda: LineModel()}
        trainer = run(out, ("ema_decay",), trainer=given, async_save=async_save, eval_strategy="steps", eval_steps=2)
        rates = iter([0.1, 0.01])
        best = trainer.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_float("learning_rate", *[next(rates)] * 2)},
            n_trials=2,
            backend="optuna",
        )
        return best.run_id, best.objective, [files_of(out / f"run-{trial}", STEPS) for trial in (0, 1)]

    waited, beside = search(tmp_path / "waited", False), search(tmp_path / "beside", True)
    assert waited == beside
    first, second = beside[2]
    assert first["ema.safetensors"] != second["ema.safetensors"]
