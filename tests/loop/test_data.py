"""The data a run sees: every `dataloader_*` argument, orders, streams, and columns."""

import random
import threading

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from trainwright import Trainer, default_data_collator
from trainwright.data.worker_transport import Receiver


class Stream(IterableDataset):
    """The rows of a map-style data set one after the other; can tell its length or not, shards itself over workers."""

    def __init__(self, data, length=None, endless=False):
        self.data, self.endless, self.num_starts = data, endless, 0
        if length is not None:
            self.__class__ = SizedStream
            self.length = length

    def __iter__(self):
        self.num_starts += 1
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            for index in range(first, len(self.data), step):
                yield self.data[index]
            if not self.endless:
                return


class SizedStream(Stream):
    def __len__(self):
        return self.length


class Batches:
    """A collator that remembers the first column of each batch."""

    def __init__(self):
        self.sizes, self.rows = [], []

    def __call__(self, features):
        self.sizes.append(len(features))
        self.rows += [tuple(feature["x"].tolist()) for feature in features]
        return default_data_collator(features)


class Losses(Trainer):
    """Keeps the inputs of every micro-batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.__dict__.setdefault("batches", []).append({name: value.clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, num_items_in_batch)


def rows_of(trainer):
    return [tuple(row.tolist()) for batch in trainer.batches for row in batch["x"]]


# ----------------------------------------------------------------------------------------------- loader arguments ----


def test_drop_last_leaves_the_incomplete_batch_out(make_trainer):
    trainer = make_trainer(cls=Losses, dataloader_drop_last=True, num_train_epochs=1)
    assert trainer.train().global_step == 5
    assert {len(batch["x"]) for batch in trainer.batches} == {4}


def test_one_batch_of_each_evaluation_set_is_made_before_the_first_step(make_trainer, line_data):
    made = []

    def collate(rows):
        made.append(len(rows))
        torch.rand(1), random.random()  # what it draws must not move the run's generators
        return default_data_collator(rows)

    def losses(**evaluates):
        sets = {"one": line_data(9, seed=5), "two": line_data(3, seed=6)}
        trainer = make_trainer({"data_collator": collate, "eval_dataset": sets}, max_steps=3, **evaluates)
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    plain, tried = losses(), losses(eval_strategy="epoch")  # which comes after the third step
    assert plain == tried
    assert made[:3] == [4, 4, 4] and made[3:8] == [8, 3, 4, 4, 4]


@pytest.mark.parametrize("num_samples", [3, 8])
def test_drop_last_with_fewer_samples_than_one_batch_is_named_before_training(
    make_trainer, line_data, num_samples, caplog
):
    data = {"eval_dataset": line_data(num_samples)}
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "metric_for_best_model": "loss"}
    options = {"max_steps": 2, "dataloader_drop_last": True, "eval_strategy": "steps", "eval_steps": 1}
    if num_samples == 8:
        make_trainer(data, **options, **best).train()
        assert "do not fill" not in caplog.text
        return
    with pytest.raises(
        ValueError, match=r"3 samples do not fill the batches of 8.*dataloader_drop_last=True.*at most 3"
    ):
        make_trainer(data, **options, **best).train()
    caplog.clear()
    trainer = make_trainer(data, **options)
    assert "eval_loss" not in trainer.evaluate()
    assert "3 samples do not fill the batches of 8" in caplog.text


@pytest.mark.parametrize("persistent", [False, True])
def test_two_workers_give_the_same_batches_as_none(make_trainer, persistent):
    alone = make_trainer(cls=Losses, num_train_epochs=2)
    shared = make_trainer(
        cls=Losses,
        num_train_epochs=2,
        dataloader_num_workers=2,
        dataloader_prefetch_factor=1,
        dataloader_persistent_workers=persistent,
        dataloader_multiprocessing_context="fork",
    )
    alone.train(), shared.train()
    assert rows_of(alone) == rows_of(shared)


def test_no_thread_is_left_of_a_run_that_stops_in_mid_epoch_and_evaluates_with_workers(make_trainer):
    before = set(threading.enumerate())
    trainer = make_trainer(max_steps=4, eval_strategy="steps", eval_steps=1, dataloader_num_workers=2)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [1, 2, 3, 4]
    new = set(threading.enumerate()) - before
    assert not [thread for thread in new if thread.name == "trainwright-batches"]


def test_a_run_receives_the_batches_of_its_workers_ahead(make_trainer, monkeypatch):
    started = []
    monkeypatch.setattr(Receiver, "start", lambda self, start=Receiver.start: (started.append(self), start(self)))
    trainer = make_trainer(max_steps=8, eval_strategy="epoch", dataloader_num_workers=2)  # 6 steps make an epoch
    trainer.train()
    assert len(started) == 4  # two epochs, and an evaluation after each
    started.clear()
    make_trainer(max_steps=8, eval_strategy="epoch").train()
    assert not started


def test_every_loader_argument_reaches_the_loader(make_trainer):
    loader = make_trainer(
        dataloader_num_workers=2,
        dataloader_prefetch_factor=3,
        dataloader_persistent_workers=True,
        dataloader_in_order=False,
        dataloader_multiprocessing_context="fork",
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
    ).get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (2, 3, True)
    assert (loader.in_order, loader.pin_memory, loader.drop_last) == (False, False, True)
    assert loader.multiprocessing_context.get_start_method() == "fork"


@pytest.mark.parametrize("name, value", [("dataloader_prefetch_factor", 2), ("dataloader_persistent_workers", True)])
def test_a_worker_option_without_workers_is_an_error_that_names_the_cure(make_trainer, name, value):
    with pytest.raises(ValueError, match=rf"{name}.*dataloader_num_workers"):
        make_trainer(max_steps=1, **{name: value}).train()


def test_batch_sizes_are_those_of_the_arguments(make_trainer, line_data):
    batches = Batches()
    trainer = make_trainer(
        trainer={"data_collator": batches},
        per_device_train_batch_size=5,
        per_device_eval_batch_size=6,
        num_train_epochs=1,
    )
    trainer.train()
    trainer.evaluate()
    assert batches.sizes == [5, 5, 5, 5, 2, 6, 3]


# --------------------------------------------------------------------------------------------------------- orders ----


def test_an_epoch_sees_each_sample_once_and_the_next_one_in_another_order(make_trainer):
    trainer = make_trainer(num_train_epochs=2)
    trainer.train()
    fetched = trainer.train_dataset.fetched
    assert sorted(fetched[:22]) == sorted(fetched[22:]) == list(range(22))
    assert fetched[:22] != fetched[22:]


def test_the_sequential_strategy_keeps_the_order(make_trainer):
    trainer = make_trainer(train_sampling_strategy="sequential", num_train_epochs=1)
    trainer.train()
    assert trainer.train_dataset.fetched == list(range(22))


class Ragged(torch.nn.Module):
    """Takes token rows and a mask, so that lengths matter."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 1)
        self.shapes = []

    def forward(self, input_ids, labels=None):
        self.shapes.append(tuple(input_ids.shape))
        out = self.embedding(input_ids).mean((1, 2))  # (batch,)
        return {"loss": (out - labels).pow(2).mean(), "logits": out}


def ragged_rows(num=24):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 20, (num,), generator=generator).tolist()
    return [{"input_ids": [1] * length, "labels": float(length)} for length in lengths]


def pad(features):
    longest = max(len(feature["input_ids"]) for feature in features)
    ids = [feature["input_ids"] + [0] * (longest - len(feature["input_ids"])) for feature in features]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor([feature["labels"] for feature in features])}


@pytest.mark.parametrize("option", [{"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}])
def test_grouping_by_length_needs_less_padding_and_starts_with_the_longest(make_trainer, option):
    def run(**arguments):
        model, rows = Ragged(), ragged_rows(64)
        trainer = make_trainer(
            trainer={"model": model, "train_dataset": rows, "data_collator": pad},
            per_device_train_batch_size=2,
            num_train_epochs=1,
            **arguments,
        )
        trainer.train()
        return model.shapes

    grouped, random = run(**option), run()
    assert sum(batch * length for batch, length in grouped) < sum(batch * length for batch, length in random)
    assert grouped[0][1] == max(length for _, length in grouped)


def test_rebalanced_batches_hold_the_samples_of_an_update_in_micro_batches_of_like_cost(make_trainer):
    model, rows = Ragged(), ragged_rows()
    trainer = make_trainer(
        trainer={"model": model, "train_dataset": rows, "data_collator": pad},
        train_sampling_strategy="batch_rebalance",
        gradient_accumulation_steps=2,
        num_train_epochs=1,
    )
    assert trainer.train().global_step == 3  # 24 samples, 8 per update
    assert sum(batch for batch, _ in model.shapes) == 24
    assert [sum(batch for batch, _ in model.shapes[i : i + 2]) for i in (0, 2, 4)] == [8, 8, 8]
    assert any(batch != 4 for batch, _ in model.shapes)


# -------------------------------------------------------------------------------------------------------- streams ----


def test_a_stream_without_length_runs_for_max_steps_over_as_many_passes_as_needed(make_trainer, line_data):
    stream = Stream(line_data(8))
    trainer = make_trainer(trainer={"train_dataset": stream}, cls=Losses, max_steps=5)
    assert trainer.train().global_step == 5
    assert stream.num_starts == 3  # two updates per pass
    assert len(rows_of(trainer)) == 20


def test_a_stream_with_a_length_runs_for_epochs(make_trainer, line_data):
    stream = Stream(line_data(8), length=8)
    trainer = make_trainer(trainer={"train_dataset": stream}, num_train_epochs=2)
    assert trainer.train().global_step == 4
    assert trainer.state.epoch == 2


def test_a_stream_is_shared_out_over_two_workers(make_trainer, line_data):
    data = line_data(8)
    trainer = make_trainer(trainer={"train_dataset": Stream(data)}, cls=Losses, max_steps=2, dataloader_num_workers=2)
    trainer.train()
    assert sorted(rows_of(trainer)) == sorted(tuple(row.tolist()) for row in data.x)


def test_a_stream_that_never_ends_stops_at_max_steps(make_trainer, line_data):
    trainer = make_trainer(trainer={"train_dataset": Stream(line_data(3), endless=True)}, max_steps=4)
    assert trainer.train().global_step == 4


class Once(IterableDataset):
    """A generator in disguise: a second pass gives nothing."""

    def __init__(self, data):
        self.rows = iter([data[index] for index in range(len(data))])

    def __iter__(self):
        return self.rows


def test_a_stream_that_is_exhausted_ends_the_run_with_a_warning(make_trainer, line_data, caplog):
    trainer = make_trainer(trainer={"train_dataset": Once(line_data(10))}, max_steps=9)
    assert trainer.train().global_step == 3  # 4 + 4 + 2 samples
    assert "no batch" in caplog.text and "step 3" in caplog.text


def test_an_evaluation_stream_without_length_is_read_to_its_end(make_trainer, line_data):
    data = line_data(9, seed=5)
    metrics = make_trainer(trainer={"eval_dataset": Stream(data)}, per_device_eval_batch_size=4).evaluate()
    assert metrics["eval_loss"] == pytest.approx(make_trainer().evaluate()["eval_loss"], rel=1e-6)
    assert metrics["eval_samples_per_second"] > 0


class Epochs(IterableDataset):
    def __init__(self, data):
        self.data, self.epochs = data, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return (self.data[index] for index in range(len(self.data)))


def test_a_stream_is_told_which_epoch_comes(make_trainer, line_data):
    stream = Epochs(line_data(4))
    make_trainer(trainer={"train_dataset": stream}, num_train_epochs=3).train()
    assert stream.epochs == [0, 1, 2]


# -------------------------------------------------------------------------------------------------------- columns ----


def test_columns_that_forward_does_not_take_are_removed_from_plain_dicts(make_trainer, line_data):
    data = line_data(8)
    rows = [{**data[index], "name": f"row {index}"} for index in range(8)]
    trainer = make_trainer(trainer={"train_dataset": rows, "eval_dataset": rows}, cls=Losses, max_steps=1)
    trainer.train()
    assert set(trainer.batches[0]) == {"x", "labels"}
    assert "eval_loss" in trainer.evaluate()


def test_columns_of_a_datasets_dataset_are_removed_and_label_becomes_labels(make_trainer, line_data):
    datasets = pytest.importorskip("datasets")
    data = line_data(8)
    table = datasets.Dataset.from_dict({"x": data.x.tolist(), "label": data.y[:, 0].tolist(), "text": ["a"] * 8})
    trainer = make_trainer(trainer={"train_dataset": table, "eval_dataset": table}, cls=Losses, max_steps=2)
    trainer.train()
    assert set(trainer.batches[0]) == {"x", "labels"}
    assert trainer.batches[0]["labels"].dtype is torch.float32
    assert trainer.predict(table).predictions.shape == (8, 1)
    assert table.column_names == ["x", "label", "text"]


def test_a_streaming_datasets_dataset_trains(make_trainer, line_data):
    datasets = pytest.importorskip("datasets")
    data = line_data(8)
    table = datasets.Dataset.from_dict({"x": data.x.tolist(), "labels": data.y.tolist(), "text": ["a"] * 8})
    trainer = make_trainer(trainer={"train_dataset": table.to_iterable_dataset()}, cls=Losses, max_steps=3)
    assert trainer.train().global_step == 3
    assert set(trainer.batches[0]) == {"x", "labels"}


def test_all_columns_stay_when_removal_is_off(make_trainer, line_data):
    data = line_data(4)
    rows = [{**data[index], "weight": torch.tensor(2.0)} for index in range(4)]

    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            weight = inputs.pop("weight")
            outputs = model(**inputs)
            loss = (weight * outputs["loss"]).mean()
            return (loss, outputs) if return_outputs else loss

    options = {"max_steps": 1, "remove_unused_columns": False}
    weighted = make_trainer(trainer={"train_dataset": rows}, cls=Weighted, **options)
    plain = make_trainer(trainer={"train_dataset": line_data(4)}, max_steps=1)
    weighted.train(), plain.train()
    assert weighted.state.log_history[0]["loss"] == pytest.approx(2 * plain.state.log_history[0]["loss"], rel=1e-6)


def test_label_names_are_kept_and_given_back_as_label_ids(make_trainer, line_data, line_model):
    class Target(type(line_model())):
        def forward(self, x, target=None):
            return super().forward(x, target)

    data = line_data(6)
    rows = [{"x": x, "target": y} for x, y in zip(data.x, data.y)]
    trainer = make_trainer(trainer={"model": Target(), "train_dataset": rows}, label_names=["target"], max_steps=1)
    trainer.train()
    output = trainer.predict(rows)
    assert output.label_ids.shape == (6, 1) and "test_loss" in output.metrics


def test_samples_that_are_objects_pass_through_to_a_collator_that_knows_them(make_trainer, line_data):
    class Sample:
        def __init__(self, x, y):
            self.x, self.y = x, y

    def collate(samples):
        return {"x": torch.stack([s.x for s in samples]), "labels": torch.stack([s.y for s in samples])}

    data = line_data(8)
    samples = [Sample(x, y) for x, y in zip(data.x, data.y)]
    trainer = make_trainer(trainer={"train_dataset": samples, "data_collator": collate}, num_train_epochs=1)
    assert trainer.train().global_step == 2


def test_a_loader_of_ones_own_is_used_as_it_is(make_trainer):
    class Own(Trainer):
        def get_train_dataloader(self):
            data = self.train_dataset
            return DataLoader(data, batch_size=11, sampler=SequentialSampler(data))

    trainer = make_trainer(cls=Own, num_train_epochs=1)
    assert trainer.train().global_step == 2
    assert trainer.train_dataset.fetched == list(range(22))


def test_a_list_of_batches_may_serve_as_the_loader(make_trainer, line_data):
    class Own(Trainer):
        def get_train_dataloader(self):
            data = line_data(8)
            return [{"x": data.x[i : i + 4], "labels": data.y[i : i + 4]} for i in (0, 4)]

    trainer = make_trainer(cls=Own, num_train_epochs=2)
    assert trainer.train().global_step == 4


@pytest.mark.parametrize("groups", [False, True])
def test_a_regression_whose_first_label_is_whole_has_one_loss_and_its_labels_for_every_batch_size(make_trainer, groups):
    rows = [{"x": torch.ones(3) * n, "label": label} for n, label in enumerate([0, 1, 0.5, 0.75, 1, 0.25])]

    class OneNumber(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(3, 1)

        def forward(self, x, labels):
            found = self.linear(x).squeeze(-1)  # (batch,)
            return {"loss": torch.nn.functional.mse_loss(found, labels), "logits": found}

    expected = [row["label"] for row in rows]
    model, losses = OneNumber(), []
    for size in (1, 2, 3, 6):
        data = {"model": model, "eval_dataset": rows, "train_dataset": rows}
        trainer = make_trainer(data, per_device_eval_batch_size=size, max_steps=1, prediction_loss_only=groups)
        losses.append(trainer.evaluate()["eval_loss"])
        if not groups:
            assert trainer.predict(rows).label_ids.tolist() == expected
    found = model(torch.stack([row["x"] for row in rows]), torch.tensor(expected))["loss"].item()
    assert losses == pytest.approx([found] * 4)
