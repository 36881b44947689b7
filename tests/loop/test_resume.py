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


@pytest.mark.parametrize("after", [2, 8], ids=["behind the first micro-batch", "inside the first micro-batch"])
def test_random_numbers_continue_where_they_were_whatever_the_batch_size_became(
    make_trainer, line_model, line_data, tmp_path, after
):
    """2 of 24 samples are done: in batches of 8 the checkpoint lies before the end of the first one."""
    states = {}

    class Remember(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            states.setdefault(("begin", state.global_step), torch.get_rng_state())

        def on_step_end(self, args, state, control, **kwargs):
            states.setdefault(("end", state.global_step), torch.get_rng_state())
            control.should_save = control.should_training_stop = True

    for size in (2, after):
        run = make_trainer(
            trainer={"model": line_model(dropout=0.5), "train_dataset": line_data(24), "callbacks": [Remember]},
            num_train_epochs=1,
            save_strategy="steps",
            save_steps=100,
            per_device_train_batch_size=size,
        )
        run.train(resume_from_checkpoint="auto")
    assert run.state.global_step == 2
    assert torch.equal(states["begin", 1], states["end", 1])


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


@pytest.mark.parametrize(
    ("length", "options", "steps"),
    [
        (40, {"train_sampling_strategy": "batch_rebalance", "per_device_train_batch_size": 3,
              "gradient_accumulation_steps": 5}, 2 * 3),  # updates of 15, 15 and 10 samples
        (30, {"dataloader_drop_last": True}, 2 * 7),
        (30, {"dataloader_drop_last": True, "gradient_accumulation_steps": 3}, 2 * 3),
        (40, {"train_sampling_strategy": "batch_rebalance", "dataloader_drop_last": True,
              "gradient_accumulation_steps": 3}, 2 * 3),
        (29, {"dataloader_drop_last": True, "num_train_epochs": 1.6, "train_sampling_strategy": "group_by_length"}, 12),
    ],
    ids=["rebalanced", "drop_last", "drop_last, short group", "rebalanced, drop_last", "part of an epoch"],
)  # fmt: skip
def test_a_resume_within_an_epoch_makes_all_updates_of_data_that_fill_no_whole_batch(
    make_trainer, line_model, line_data, tmp_path, length, options, steps
):
    def model():
        return line_model(dropout=0.5)

    rows = [{**row, "input_ids": [0] * (1 + 7 * index % 11)} for index, row in enumerate(line_data(length))]

    def collate(samples):
        return {name: torch.stack([sample[name] for sample in samples]) for name in ("x", "labels")}

    data = {"train_dataset": rows, "data_collator": collate}
    options = {
        "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "remove_unused_columns": False, **options,
    }  # fmt: skip
    whole = make_trainer(trainer={"model": model(), **data}, **options)
    whole.train()
    assert whole.state.max_steps == whole.state.global_step == steps
    for at in (1, steps // 2, steps // 2 + 1, steps):
        resumed = make_trainer(trainer={"model": model(), **data}, output_dir=str(tmp_path / "again"), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
        assert_same(whole, resumed)
        assert resumed.state.max_steps == steps


class OfTwoSizes(torch.utils.data.Sampler):
    """Batches of 1 and 7 samples in turn, as a sampler gives them that fills batches by tokens."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return len(list(iter(self)))

    def __iter__(self):
        begin, size = 0, 1
        while begin < self.length:
            yield list(range(begin, min(begin + size, self.length)))
            begin, size = begin + size, 8 - size


def test_a_loader_with_batches_of_unequal_size_is_continued_at_the_same_batch(
    make_trainer, line_model, line_data, tmp_path
):
    class Unequal(Trainer):
        def get_train_dataloader(self):
            data = self.train_dataset
            return torch.utils.data.DataLoader(data, batch_sampler=OfTwoSizes(len(data)))

    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 100}
    data = {"train_dataset": line_data(27)}
    whole = make_trainer(trainer=data, cls=Unequal, **options)
    whole.train()
    assert whole.state.global_step == 2 * 8  # 1, 7, 1, 7, 1, 7, 1, 2
    for at in (3, 6):
        assert_same(whole, interrupted(make_trainer, tmp_path, at, line_model, trainer=data, cls=Unequal, **options))


@pytest.mark.parametrize("max_steps", [25, 40, 41, 60])
@pytest.mark.parametrize(
    "after",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 16},
        {"per_device_train_batch_size": 3},
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": 3},
    ],
    ids=str,
)
def test_a_run_in_steps_reaches_them_whatever_the_size_of_an_update_became(
    make_trainer, line_data, tmp_path, max_steps, after
):
    options = {"save_strategy": "steps", "save_steps": 1000, "logging_steps": 100, "gradient_accumulation_steps": 2}
    data = {"train_dataset": line_data(32)}
    make_trainer(trainer=data, max_steps=20, **{**options, "per_device_train_batch_size": 8}).train()
    longer = make_trainer(trainer=data, max_steps=max_steps, **{**options, "per_device_train_batch_size": 8, **after})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == longer.state.max_steps == max_steps
    assert (tmp_path / "out" / f"checkpoint-{max_steps}").is_dir()
    assert longer._get_learning_rate() == 0.0  # the schedule ended
    batches = -(-32 // longer.args.per_device_train_batch_size)
    per_epoch = -(-batches // longer.args.gradient_accumulation_steps)
    assert longer.state.num_train_epochs == 10 + -(-(max_steps - 20) // per_epoch)  # 20 updates were 10 epochs


def test_fewer_accumulation_steps_within_an_epoch_leave_no_batch_untrained(
    make_trainer, line_model, line_data, tmp_path
):
    for before, after, at in ((3, 2, 1), (1, 2, 3), (2, 5, 3)):
        data = line_data(40)  # 10 micro-batches
        resumed = interrupted(
            make_trainer, tmp_path / f"{before}-{after}", at, line_model, trainer={"train_dataset": data},
            num_train_epochs=1, save_strategy="steps", save_steps=100, gradient_accumulation_steps=before,
            resume_with={"gradient_accumulation_steps": after},
        )  # fmt: skip
        assert sorted(data.fetched) == list(range(40))
        assert resumed.state.global_step == resumed.state.max_steps == at + -(-(10 - before * at) // after)


def test_a_stream_in_smaller_batches_is_continued_where_it_was(make_trainer, line_model, line_data, tmp_path):
    """More small batches lie before the place than the whole run has updates."""
    data = line_data(64)
    resumed = interrupted(
        make_trainer, tmp_path, 4, line_model, trainer={"train_dataset": Stream(data)}, max_steps=6,
        per_device_train_batch_size=8, save_strategy="steps", save_steps=100,
        resume_with={"per_device_train_batch_size": 1},
    )  # fmt: skip
    assert resumed.state.global_step == 6
    assert data.fetched[-2:] == [32, 33]


class EndsEpochsEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step % 2 == 0


def test_an_epoch_that_a_callback_ended_is_not_continued_and_its_steps_are_made_up(make_trainer, tmp_path):
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(trainer={"callbacks": [EndsEpochsEarly()]}, **options)
    whole.train()
    assert whole.state.global_step == 10 and whole.state.epoch > 4
    for at in (3, 4):
        resumed = make_trainer(
            trainer={"callbacks": [EndsEpochsEarly()]}, output_dir=str(tmp_path / f"from-{at}"), **options
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
        assert_same(whole, resumed)


class Drawing(torch.utils.data.Dataset):
    """Samples with noise, so that an evaluation draws random numbers too."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"x": torch.rand(3), "labels": torch.tensor([index / self.length])}


@pytest.mark.parametrize("logging_strategy", ["steps", "epoch"])
def test_what_an_epoch_ends_with_is_done_after_a_stop_at_its_last_step(
    make_trainer, line_model, tmp_path, logging_strategy
):
    options = {
        "num_train_epochs": 2.5, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "epoch",
        "logging_strategy": logging_strategy, "logging_steps": 4,
    }  # fmt: skip
    data = {"train_dataset": Drawing(22), "eval_dataset": Drawing(5)}
    whole = make_trainer(trainer={"model": line_model(dropout=0.5), **data}, **options)
    whole.train()
    assert len([line for line in whole.state.log_history if "eval_loss" in line]) == 3
    for at in (5, 6, 12, 15):
        resumed = make_trainer(trainer=data, output_dir=str(tmp_path / f"from-{at}"), **options)
        resumed.model.dropout.p = 0.5
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
        assert_same(whole, resumed)


@pytest.mark.parametrize("max_steps", [2, 3])
def test_a_run_at_its_target_says_that_there_is_nothing_to_train(make_trainer, caplog, max_steps):
    options = {"save_strategy": "steps", "save_steps": 1}
    done = make_trainer(max_steps=3, **options).train()
    caplog.clear()
    again = make_trainer(max_steps=max_steps, **options)
    assert again.train(resume_from_checkpoint="auto").training_loss == done.training_loss
    (said,) = [record.getMessage() for record in caplog.records if "nothing to train" in record.getMessage()]
    assert "checkpoint-3" in said and f"max_steps={max_steps}" in said and "raise max_steps" in said
    assert "Resumed from" not in caplog.text


def test_epochs_that_are_done_are_nothing_to_train_either(make_trainer, caplog):
    for epochs in (2, 2, 1):
        make_trainer(num_train_epochs=epochs, save_strategy="epoch").train(resume_from_checkpoint="auto")
    said = [record.getMessage() for record in caplog.records if "nothing to train" in record.getMessage()]
    assert ["num_train_epochs=2" in said[0], "num_train_epochs=1" in said[1], len(said)] == [True, True, 2]


def test_a_resumed_run_says_from_where(make_trainer, caplog):
    make_trainer(max_steps=8, save_strategy="steps").train()
    assert "Resumed" not in caplog.text
    make_trainer(max_steps=12, save_strategy="steps").train(resume_from_checkpoint=True)
    said = [record for record in caplog.records if "Resumed" in record.getMessage()]
    assert [(record.levelname, record.getMessage()) for record in said] == [
        ("WARNING", "Resumed from checkpoint-8: step 8 of 12, 8 samples into epoch 1.")
    ]


class Epochs(TrainerCallback):
    def __init__(self):
        self.steps, self.ends = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.epoch)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append(state.epoch)


class Sized(Stream):
    """Says that it is longer than it is."""

    def __len__(self):
        return 2 * len(self.data)


@pytest.mark.parametrize("kind", [Stream, Sized])
def test_the_epochs_of_a_stream_that_ends_early_are_counted(make_trainer, line_model, line_data, tmp_path, kind):
    def trainer(directory):
        data = {"train_dataset": kind(line_data(20)), "callbacks": [heard := Epochs()]}  # 5 micro-batches, 3 updates
        return heard, make_trainer(
            trainer=data, output_dir=str(tmp_path / directory), max_steps=8, gradient_accumulation_steps=2,
            save_strategy="steps", save_steps=1,
        )  # fmt: skip

    heard, whole = trainer("out")
    whole.train()
    announced = 8 * 2 if kind is Stream else 10  # as many as the updates need, or as the stream says
    first = [batches / announced for batches in (2, 4, 5)]  # its length is not known yet
    assert heard.steps == pytest.approx([*first, *(1 + batches / 5 for batches in (2, 4, 5)), 2 + 2 / 5, 2 + 4 / 5])
    assert heard.ends == pytest.approx([1, 2, 2.8]) and heard.steps == sorted(heard.steps)
    for at in (1, 3, 5):
        heard_again, resumed = trainer(f"from-{at}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
        assert heard_again.steps == heard.steps[at:]
        assert_same(whole, resumed)


class Tokens(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.num_input_tokens_seen)


@pytest.mark.parametrize("mode", ["all", "non_padding"])
def test_tokens_are_counted_at_the_end_of_each_step(make_trainer, mode):
    class Masked(torch.nn.Module):
        main_input_name = "x"

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 1)

        def forward(self, x, attention_mask, labels=None):
            return {"loss": (self.linear(x) - labels).pow(2).mean()}

    rows = [
        {"x": torch.ones(3), "attention_mask": torch.arange(3) <= index % 3, "labels": torch.ones(1)}
        for index in range(16)
    ]
    data = {"model": Masked(), "train_dataset": rows, "eval_dataset": None, "callbacks": [tokens := Tokens()]}
    make_trainer(
        trainer=data, max_steps=4, logging_steps=500, include_num_input_tokens_seen=mode,
        train_sampling_strategy="sequential",
    ).train()  # fmt: skip
    of_rows = [3 if mode == "all" else 1 + index % 3 for index in range(16)]
    assert tokens.seen == [sum(of_rows[: 4 * step]) for step in (1, 2, 3, 4)]


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


@pytest.mark.parametrize("at", [1, 3, 5, 6, 7])
@pytest.mark.parametrize("foreign", [False, True], ids=["", "from another implementation"])
def test_the_first_line_after_a_resume_is_the_mean_over_the_updates_since_the_line_before(
    make_trainer, line_model, tmp_path, at, foreign
):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 100}  # 6 updates per epoch
    every = make_trainer(**options)
    every.train()
    single = [line["loss"] for line in every.state.log_history if "loss" in line]
    options.update(logging_steps=4, logging_first_step=True)
    out = str(tmp_path / "resumed")
    make_trainer(trainer={"callbacks": [StopAt(at)]}, output_dir=out, **options).train()
    if foreign:  # which says nothing of the losses since its last line: those after it remain
        for name in ("loop_state.json", "manifest.json"):
            (Path(out) / f"checkpoint-{at}" / name).unlink()
    resumed = make_trainer(output_dir=out, **options)
    resumed.train(resume_from_checkpoint=True)
    lines = {line["step"]: line["loss"] for line in resumed.state.log_history if "loss" in line}
    assert list(lines) == [1, 4, 8, 12]
    starts = {1: 0, 4: 1, 8: 4, 12: 8}
    for step, before in starts.items():
        if foreign and before < at < step:
            before = at
        assert lines[step] == pytest.approx(sum(single[before:step]) / (step - before), rel=1e-6), step


def test_starting_anew_where_another_run_left_checkpoints_is_said(make_trainer, caplog):
    make_trainer(save_strategy="steps", save_steps=2, max_steps=2).train()
    assert "another one" not in caplog.text
    make_trainer(save_strategy="steps", save_steps=2, max_steps=2).train()
    assert "checkpoint-2" in caplog.text and "resume_from_checkpoint=True" in caplog.text
