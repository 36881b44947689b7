"""A run that was interrupted and resumed ends exactly where one without interruption ends."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from trainwright import Trainer, TrainerCallback
from trainwright.state import ExportableState

FIXTURES = Path(__file__).parents[1] / "fixtures"
TIMES = ("runtime", "per_second")


class StopAt(TrainerCallback):
    """Ends the run after a step, as an interruption does: the schedule was made for the whole run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def log_of(trainer):
    """The log history without times, and without the last line, which a resumed run writes again."""
    return [
        {key: value for key, value in line.items() if not any(part in key for part in TIMES)}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]


def tensors_of(value, path=""):
    """Flat name -> tensor of a nested state."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in tensors_of(item, f"{path}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for key, item in enumerate(value) for k, v in tensors_of(item, f"{path}.{key}").items()}
    return {}


def assert_same(first, second):
    """Two trainers are in the same state, bit for bit."""
    for one, other in [
        (first.model.state_dict(), second.model.state_dict()),
        (first.optimizer.state_dict(), second.optimizer.state_dict()),
    ]:
        expected, found = tensors_of(one), tensors_of(other)
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert first.lr_scheduler.state_dict()["last_epoch"] == second.lr_scheduler.state_dict()["last_epoch"]
    assert log_of(first) == log_of(second)
    assert first.state.global_step == second.state.global_step
    assert first.state.epoch == second.state.epoch


def interrupted(make_trainer, tmp_path, at, model, trainer=None, resume_with=None, **options):
    """Train to step `at` in one trainer, and from its checkpoint to the end in another."""
    out = str(tmp_path / f"resumed-{at}")
    first = make_trainer(
        trainer={"model": model(), **(trainer or {}), "callbacks": [StopAt(at)]}, output_dir=out, **options
    )
    first.train()
    assert first.state.global_step == at
    second = make_trainer(
        trainer={"model": model(), **(trainer or {})}, output_dir=out, **{**options, **(resume_with or {})}
    )
    torch.manual_seed(99)  # the checkpoint must bring back every generator
    torch.rand(3)
    second.train(resume_from_checkpoint=True)
    return second


@pytest.mark.parametrize("at", [1, 4, 6, 7, 12], ids=lambda step: f"at step {step}")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_resumed_run_is_bit_exact(make_trainer, line_model, tmp_path, at, bf16):
    def model():
        return line_model(dropout=0.5)

    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 100, "logging_steps": 5, "bf16": bf16}
    whole = make_trainer(trainer={"model": model()}, **options)  # 6 updates per epoch
    whole.train()
    assert_same(whole, interrupted(make_trainer, tmp_path, at, model, **options))


@pytest.mark.parametrize("at", [1, 2, 3, 4], ids=lambda step: f"at step {step}")
def test_a_resumed_run_with_accumulation_is_bit_exact(make_trainer, line_model, line_data, tmp_path, at):
    def model():
        return line_model(dropout=0.5)

    data = {"train_dataset": line_data(27)}  # 7 micro-batches: updates of 3, 3 and 1
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 3, "save_strategy": "steps", "save_steps": 100}
    whole = make_trainer(trainer={"model": model(), **data}, **options)
    whole.train()
    assert whole.state.global_step == 6
    assert_same(whole, interrupted(make_trainer, tmp_path, at, model, trainer=data, **options))


def test_a_resume_with_evaluations_in_between_is_bit_exact(make_trainer, line_model, tmp_path):
    def model():
        return line_model(dropout=0.5)

    options = {
        "max_steps": 9,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    whole = make_trainer(trainer={"model": model()}, **options)
    whole.train()
    resumed = interrupted(make_trainer, tmp_path, 4, model, **options)
    assert_same(whole, resumed)
    assert resumed.state.best_metric == whole.state.best_metric


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_where_a_resume_continues(make_trainer, line_model, tmp_path, workers):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 100, "dataloader_num_workers": workers}
    whole = make_trainer(**{**options, "dataloader_num_workers": 0})
    whole.train()
    assert_same(whole, interrupted(make_trainer, tmp_path, 4, line_model, **options))


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
@pytest.mark.parametrize("at", [2, 5])
def test_every_order_of_the_data_is_continued_exactly(make_trainer, tmp_path, strategy, at):
    rows = [{"input_ids": torch.arange(1 + (7 * index) % 11), "labels": torch.tensor(1.0)} for index in range(30)]

    class Lengths(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = torch.nn.Embedding(12, 2)

        def forward(self, input_ids, labels=None):
            out = self.embedding(input_ids).mean((1, 2))
            return {"loss": (out - labels).pow(2).mean(), "logits": out}

    def pad(features):
        ids = torch.nn.utils.rnn.pad_sequence([feature["input_ids"] for feature in features], batch_first=True)
        return {"input_ids": ids, "labels": torch.stack([feature["labels"] for feature in features])}

    data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": pad}
    options = {
        "train_sampling_strategy": strategy,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,  # 4 updates each
        "save_strategy": "steps",
        "save_steps": 100,
    }
    whole = make_trainer(trainer={"model": Lengths(), **data}, **options)
    whole.train()
    assert whole.state.global_step == 8
    assert_same(whole, interrupted(make_trainer, tmp_path, at, Lengths, trainer=data, **options))


@pytest.mark.parametrize("schedule", ["cosine", "reduce_lr_on_plateau", "greedy"])
def test_a_schedule_is_continued_also_one_that_waits_for_a_metric(make_trainer, line_model, tmp_path, schedule):
    options = {
        "lr_scheduler_type": schedule,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 100,
    }
    whole = make_trainer(**options)
    whole.train()
    assert_same(whole, interrupted(make_trainer, tmp_path, 3, line_model, **options))


def test_skipped_samples_are_not_fetched(make_trainer, line_model, line_data, tmp_path):
    data = line_data(22)
    interrupted(
        make_trainer,
        tmp_path,
        4,
        line_model,
        trainer={"train_dataset": data},
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=100,
    )
    assert sorted(data.fetched) == list(range(22))  # each once, over both runs


@pytest.mark.parametrize("before, after", [(4, 8), (4, 2), (2, 3), (2, 8)])
def test_a_changed_batch_size_neither_skips_nor_repeats_a_sample(
    make_trainer, line_model, line_data, tmp_path, before, after
):
    data = line_data(24)
    resumed = interrupted(
        make_trainer,
        tmp_path,
        3,
        line_model,
        trainer={"train_dataset": data},
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=100,
        per_device_train_batch_size=before,
        resume_with={"per_device_train_batch_size": after},
    )
    assert sorted(data.fetched) == list(range(24))
    assert resumed.state.epoch == 1
    assert resumed.state.global_step == resumed.state.max_steps  # so that the last step is saved and evaluated


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[index] for index in range(len(self.data)))


@pytest.mark.parametrize("at", [2, 3, 6])
def test_a_stream_is_continued_where_it_was_left(make_trainer, line_model, line_data, tmp_path, at):
    data = {"train_dataset": Stream(line_data(14))}  # 4 updates per pass
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 100}
    whole = make_trainer(trainer=data, **options)
    whole.train()
    assert_same(whole, interrupted(make_trainer, tmp_path, at, line_model, trainer=data, **options))


def test_data_may_be_started_over_when_asked_for(make_trainer, line_model, line_data, tmp_path):
    data = line_data(22)
    options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 100, "ignore_data_skip": True}
    interrupted(make_trainer, tmp_path, 4, line_model, trainer={"train_dataset": data}, **options)
    assert data.fetched[16:24] == data.fetched[:8]  # the two updates that were left see the first batches again


def test_changed_intervals_are_obeyed_after_a_resume(make_trainer, line_model, tmp_path):
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 100, "logging_steps": 1}
    resumed = interrupted(
        make_trainer,
        tmp_path,
        4,
        line_model,
        resume_with={"logging_steps": 3, "save_steps": 5, "eval_strategy": "steps", "eval_steps": 4},
        **options,
    )
    log = resumed.state.log_history
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 6, 9]
    assert [line["step"] for line in log if "eval_loss" in line] == [8, 10]
    kept = {path.name for path in (tmp_path / "resumed-4").glob("checkpoint-*")}
    assert kept == {"checkpoint-4", "checkpoint-5", "checkpoint-10"}


def test_a_run_may_be_made_longer(make_trainer, line_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(max_steps=3, **options).train()
    longer = make_trainer(max_steps=7, **options)
    assert longer.train(resume_from_checkpoint=True).global_step == 7
    assert [line["step"] for line in longer.state.log_history if "loss" in line] == list(range(1, 8))


def test_a_run_that_is_already_over_is_not_trained_further(make_trainer):
    options = {"max_steps": 3, "save_strategy": "steps"}
    done = make_trainer(**options)
    done.train()
    again = make_trainer(**options)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    assert torch.equal(again.model.linear.weight, done.model.linear.weight)


def test_true_finds_the_newest_checkpoint_and_a_path_takes_that_one(make_trainer, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**options).train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    seen = []

    class Watch(Trainer):
        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            seen.append(Path(resume_from_checkpoint).name)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    make_trainer(cls=Watch, **options).train(resume_from_checkpoint=True)
    make_trainer(cls=Watch, **options).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    make_trainer(cls=Watch, **options).train(resume_from_checkpoint=False)
    assert seen == ["checkpoint-3", "checkpoint-2"]


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_older_one_used(make_trainer, tmp_path, caplog):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**options)
    whole.train()
    weights = tmp_path / "out" / "checkpoint-4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4" in caplog.text and "DAMAGED" in caplog.text
    assert (tmp_path / "out" / "checkpoint-4.damaged").is_dir()
    assert_same(whole, resumed)


def test_the_training_loss_of_the_result_covers_the_whole_run(make_trainer, line_model, tmp_path):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 100, "logging_steps": 3}
    whole = make_trainer(**options)
    loss = whole.train().training_loss
    resumed = interrupted(make_trainer, tmp_path, 4, line_model, **options)
    last = resumed.state.log_history[-1]
    assert last["train_loss"] == pytest.approx(loss, rel=1e-12)


class Counter(TrainerCallback, ExportableState):
    def __init__(self, limit=5):
        self.limit, self.steps = limit, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {"limit": self.limit}, "attributes": {"steps": self.steps}}


@pytest.mark.parametrize("restore, limit", [(False, 7), (True, 5)])
def test_what_a_callback_counted_comes_back_and_its_arguments_when_asked_for(make_trainer, restore, limit):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(trainer={"callbacks": [Counter(5)]}, max_steps=2, **options).train()
    trainer = make_trainer(
        trainer={"callbacks": [Counter(7)]}, max_steps=5, restore_callback_states_from_checkpoint=restore, **options
    )
    trainer.train(resume_from_checkpoint=True)
    counter = trainer.pop_callback(Counter)
    assert (counter.steps, counter.limit) == (5, limit)


def test_tokens_operations_and_the_best_metric_go_on_from_the_checkpoint(make_trainer, line_model, tmp_path):
    class Counted(type(line_model())):
        main_input_name = "x"

        def floating_point_ops(self, inputs):
            return 2.0 * inputs["x"].numel()

    options = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 100,
        "logging_steps": 3,
        "include_num_input_tokens_seen": "non_padding",
    }
    whole = make_trainer(trainer={"model": Counted()}, **options)
    whole.train()
    resumed = interrupted(make_trainer, tmp_path, 4, Counted, **options)
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen > 0
    assert resumed.state.total_flos == whole.state.total_flos > 0


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
}


class BestAtTwo(Trainer):
    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        metrics["eval_loss"] = float(abs(self.state.global_step - 2))
        return metrics


def test_the_best_checkpoint_survives_rotation_over_a_resume(make_trainer, tmp_path):
    make_trainer(cls=BestAtTwo, max_steps=4, **BEST).train()
    trainer = make_trainer(cls=BestAtTwo, max_steps=6, **BEST)
    trainer.train(resume_from_checkpoint=True)
    out = tmp_path / "out"
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    from safetensors.torch import load_file

    saved = load_file(out / "checkpoint-2" / "model.safetensors")
    assert torch.equal(saved["linear.weight"], trainer.model.linear.weight)


def test_an_output_directory_that_was_moved_resumes_and_finds_its_best_checkpoint(make_trainer, tmp_path):
    make_trainer(cls=BestAtTwo, max_steps=4, **BEST).train()
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(tmp_path / "out", moved)
    trainer = make_trainer(cls=BestAtTwo, max_steps=6, **{**BEST, "output_dir": str(moved)})
    trainer.train(resume_from_checkpoint=True)
    assert {path.name for path in moved.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    from safetensors.torch import load_file

    saved = load_file(moved / "checkpoint-2" / "model.safetensors")
    assert torch.equal(saved["linear.weight"], trainer.model.linear.weight)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------- checkpoints of the documented releases ----


def reference():
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("make_checkpoints", FIXTURES / "make_checkpoints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RELEASES = sorted(path.name for path in (FIXTURES / "checkpoints").iterdir())


class CountsEveryLabel(Trainer):
    """Counts the first label of a sequence too, which is never a target, as the documented releases do."""

    def _get_num_items_in_batch(self, batch_samples, device):
        return sum((batch["labels"] != -100).sum() for batch in batch_samples)


def resumed_from(release, make_trainer, tmp_path, cls=Trainer):
    made = reference()
    out = tmp_path / "run"
    shutil.copytree(FIXTURES / "checkpoints" / release / "checkpoint-2", out / "checkpoint-2")
    trainer = make_trainer(
        trainer={"model": made.model(), "train_dataset": made.dataset(), "eval_dataset": None},
        cls=cls,
        output_dir=str(out),
        max_steps=made.NUM_STEPS,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
    )
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("cls, tolerance", [(CountsEveryLabel, 1e-6), (Trainer, 1e-4)])
def test_a_checkpoint_of_a_documented_release_is_resumed_to_its_weights(
    make_trainer, tmp_path, release, cls, tolerance
):
    from safetensors.torch import load_file

    # Adam divides the scale of the loss out again but for its epsilon, so the other count moves weights very little.
    trainer = resumed_from(release, make_trainer, tmp_path, cls)
    found = trainer.model.state_dict()
    for name, value in load_file(FIXTURES / "checkpoints" / release / "final.safetensors").items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("release", RELEASES)
def test_the_log_of_a_documented_release_is_continued(make_trainer, tmp_path, release):
    trainer = resumed_from(release, make_trainer, tmp_path, CountsEveryLabel)
    state = json.loads((FIXTURES / "checkpoints" / release / "final_trainer_state.json").read_text())
    theirs = [line["loss"] for line in state["log_history"] if "loss" in line]
    ours = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(ours) == len(theirs) == 4
    assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(ours, theirs))  # older releases round to 4 decimals


def test_starting_anew_where_another_run_left_checkpoints_is_said(make_trainer, caplog):
    make_trainer(save_strategy="steps", save_steps=2, max_steps=2).train()
    assert "another one" not in caplog.text
    make_trainer(save_strategy="steps", save_steps=2, max_steps=2).train()
    assert "checkpoint-2" in caplog.text and "resume_from_checkpoint=True" in caplog.text
