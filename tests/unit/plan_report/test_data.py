"""Columns, lengths and padding, compared with the batches that a loader makes."""

import numpy as np
import pytest
import torch
from torch import nn

from trainwright.plan_report.data import columns_of, lengths_of, padding_of

LENGTHS = [3, 17, 4, 9, 1, 12, 5, 5, 20, 2, 7, 8, 11, 6]


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 4)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"loss": self.embedding(input_ids).mean()}


def pad(samples):
    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = [sample["input_ids"] + [0] * (longest - len(sample["input_ids"])) for sample in samples]
    return {"input_ids": torch.tensor(rows)}


SAMPLES = [{"input_ids": [1] * length, "text": "a"} for length in LENGTHS]


def test_padding_is_that_of_the_batches(make_trainer):
    arguments = {"per_device_train_batch_size": 3, "train_sampling_strategy": "sequential"}
    parts = {"model": Tokens(), "train_dataset": SAMPLES, "eval_dataset": None, "data_collator": pad}
    trainer = make_trainer(trainer=parts, **arguments)
    data = trainer.plan_report().as_dict()["data"]
    batches = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    places, padding = sum(batch.numel() for batch in batches), sum(int((batch == 0).sum()) for batch in batches)
    assert data["padding"]["now"] == pytest.approx(padding / places)
    assert data["padding"]["grouped"] < data["padding"]["now"]
    assert data["columns"] == {"kept": ["input_ids"], "dropped": ["text"]}
    lengths = data["lengths"]
    assert (lengths["shortest"], lengths["longest"]) == (min(LENGTHS), max(LENGTHS))
    assert lengths["num_read"] == len(LENGTHS) and lengths["mean"] == round(np.mean(LENGTHS), 1)


def test_packs_of_equal_halves_are_full():
    halves = np.full(10, 8)
    shares = {"batch_size": 2, "group_size": 2, "strategy": "random", "seed": 0}
    assert padding_of(halves, halves, packing_length=16, **shares) == {"now": 0.0, "grouped": 0.0, "packed": 0.0}
    uneven = padding_of(np.array([8, 8, 8]), np.array([16, 16, 16]), packing_length=16, **shares)
    assert uneven["now"] == pytest.approx(0.5)  # rows that were padded before
    assert uneven["packed"] == pytest.approx(1 - 24 / 32)
    assert padding_of(halves, halves, packing_length=None, **shares)["packed"] is None


def test_tokens_that_a_mask_leaves_out_are_padding():
    samples = [{"input_ids": [1, 1, 0, 0], "attention_mask": [1, 1, 0, 0]}]
    tokens, places = lengths_of(samples, "input_ids")
    assert (tokens.tolist(), places.tolist()) == ([2], [4])


def test_a_bounded_number_of_samples_is_read():
    class Large(torch.utils.data.Dataset):
        num_read = 0

        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            self.num_read += 1
            return {"input_ids": torch.ones(index % 7 + 1, dtype=torch.long)}

    data = Large()
    tokens, _ = lengths_of(data, "input_ids")
    assert len(tokens) == data.num_read == 256 and set(tokens.tolist()) <= set(range(1, 8))


@pytest.mark.parametrize(
    "samples", [[], [(1, 2)], [{"x": [1]}], *([{"input_ids": value}] for value in (3, [[1], [2]], torch.ones(2, 2)))]
)
def test_samples_without_sequences_have_no_lengths(samples):
    assert lengths_of(samples, "input_ids") is None


def test_a_table_of_the_datasets_library_is_read_by_column():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in LENGTHS], "text": ["a"] * len(LENGTHS)})
    tokens, places = lengths_of(table, "input_ids")
    assert tokens.tolist() == places.tolist() == LENGTHS
    assert columns_of(table, {"input_ids"}) == {"kept": ["input_ids"], "dropped": ["text"]}
    assert columns_of(table, None) == {"kept": ["input_ids", "text"], "dropped": []}


def test_a_stream_is_not_read(make_trainer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            raise AssertionError("it was read")

    report = make_trainer(trainer={"train_dataset": Stream()}, max_steps=6, eval_strategy="no").plan_report(num_steps=2)
    plan = report.as_dict()
    assert plan["run"]["updates"] == 6 and plan["run"]["examples"] is None and plan["data"]["columns"] is None
    assert plan["memory"]["activations_bytes"] is None and "stream" in plan["memory"]["activations_found"]
    assert plan["time"] is None and report.problems == []
    assert any("stream cannot be read again" in text for text in report.warnings)
