"""Evaluation in another order than that of the data set: the same predictions in the same rows, with less padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainwright import Trainer, TrainingArguments

IGNORED = -100
BATCH_SIZE = 4
ORDERS = ["sequential", "group_by_length", "length_sorted"]


class Tagger(nn.Module):
    """A class for each token, from the token alone, so that padding changes nothing; counts what it is given."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 3)
        self.shapes: list[tuple[int, int]] = []

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.shapes.append(tuple(input_ids.shape))
        logits = self.embedding(input_ids)  # (batch, seq, classes)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return {"loss": loss, "logits": logits, "first": logits[:, 0]}


def samples(num_samples: int = 27) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (num_samples,), generator=generator)
    rows = [torch.randint(1, 50, (int(length),), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row % 3} for row in rows]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED),
    }


def tagger(tmp_path: Any, compute_metrics: Any = None, **arguments: Any) -> Any:
    values: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    values.update(per_device_eval_batch_size=BATCH_SIZE, **arguments)
    return Trainer(
        Tagger(), TrainingArguments(str(tmp_path), **values), eval_dataset=samples(), data_collator=collate,
        compute_metrics=compute_metrics,
    )  # fmt: skip


class Keep:
    def __call__(self, prediction: Any) -> dict[str, float]:
        self.prediction = prediction
        return {}


@pytest.mark.parametrize("budget", [None, 1e-7])
@pytest.mark.parametrize("order", ORDERS[1:])
def test_every_row_is_that_of_its_sample_whatever_the_order(tmp_path: Any, order: str, budget: float | None) -> None:
    seen: list[Any] = []
    for strategy, gib in (("sequential", None), (order, budget)):
        keep = Keep()
        trainer = tagger(
            tmp_path, keep, eval_sampling_strategy=strategy, include_for_metrics=["inputs"],
            eval_memory_budget_gib=gib,
        )  # fmt: skip
        output = trainer.predict(samples())
        logits, first = output.predictions
        # Behind a sample's tokens stand the logits of the padding, as far as its batch was padded.
        logits = np.where(output.label_ids[..., None] == IGNORED, 0, logits)
        inputs = np.where(output.label_ids == IGNORED, 0, keep.prediction.inputs)
        seen.append((logits, first, output.label_ids, inputs, output.metrics["test_loss"]))
    for one, other in zip(*seen):
        if isinstance(one, float):
            assert one == pytest.approx(other, rel=1e-6)  # the same mean, from other batches
        else:
            assert one.dtype == other.dtype and np.array_equal(one, other)
    for index, sample in enumerate(samples()):
        length = len(sample["labels"])
        assert np.array_equal(seen[1][2][index, :length], sample["labels"].numpy())
        assert (seen[1][2][index, length:] == IGNORED).all()


@pytest.mark.parametrize("order", ORDERS)
def test_losses_are_in_the_rows_of_their_samples(tmp_path: Any, order: str) -> None:
    keep = Keep()
    trainer = tagger(
        tmp_path, keep, eval_sampling_strategy=order, include_for_metrics=["loss"], per_device_train_batch_size=1
    )
    trainer.args.per_device_eval_batch_size = 1
    trainer.evaluate()
    expected = [trainer.model(**collate([row]))["loss"].item() for row in samples()]
    np.testing.assert_allclose(keep.prediction.losses, expected, rtol=1e-6)


def padding(trainer: Any) -> int:
    """Positions that a pass over the data computed for nothing."""
    trainer.model.shapes.clear()
    trainer.evaluate()
    computed = sum(rows * width for rows, width in trainer.model.shapes)
    return computed - sum(len(row["input_ids"]) for row in samples())


def test_sorted_batches_have_the_least_padding_there_can_be(tmp_path: Any) -> None:
    lengths = sorted((len(row["input_ids"]) for row in samples()), reverse=True)
    batches = [lengths[start : start + BATCH_SIZE] for start in range(0, len(lengths), BATCH_SIZE)]
    least = sum(max(batch) * len(batch) - sum(batch) for batch in batches)
    wasted = {order: padding(tagger(tmp_path, eval_sampling_strategy=order)) for order in ORDERS}
    assert wasted["length_sorted"] == least < wasted["sequential"] / 4
    assert wasted["group_by_length"] < wasted["sequential"]


def test_the_longest_samples_come_first(tmp_path: Any) -> None:
    trainer = tagger(tmp_path, eval_sampling_strategy="length_sorted")
    trainer.evaluate()
    widths = [width for _, width in trainer.model.shapes]
    assert widths == sorted(widths, reverse=True)


def test_without_a_choice_evaluation_is_grouped_where_training_is(tmp_path: Any) -> None:
    grouped = tagger(tmp_path, train_sampling_strategy="group_by_length")
    assert padding(grouped) == padding(tagger(tmp_path, eval_sampling_strategy="group_by_length"))
    assert padding(tagger(tmp_path)) == padding(tagger(tmp_path, eval_sampling_strategy="sequential"))
    sequential = tagger(tmp_path, train_sampling_strategy="group_by_length", eval_sampling_strategy="sequential")
    assert padding(sequential) == padding(tagger(tmp_path))


def test_rows_keep_the_order_of_the_samples_when_the_last_batch_is_dropped(tmp_path: Any) -> None:
    output = tagger(tmp_path, eval_sampling_strategy="length_sorted", dataloader_drop_last=True).predict(samples())
    lengths = [len(row["labels"]) for row in samples()]
    longest = sorted(sorted(range(27), key=lambda index: -lengths[index])[:24])  # the 3 shortest are left out
    assert (output.label_ids != IGNORED).sum(1).tolist() == [lengths[index] for index in longest]


def test_rows_that_are_no_samples_stay_as_they_came(tmp_path: Any) -> None:
    trainer = tagger(tmp_path, eval_sampling_strategy="length_sorted")
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits[0].flatten(0, 1)  # a row per token
    output = trainer.predict(samples())
    assert len(output.predictions) == sum(rows * width for rows, width in trainer.model.shapes)
    assert np.array_equal(output.label_ids, tagger(tmp_path).predict(samples()).label_ids)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"eval_sampling_strategy": "lenght_sorted"}, "Did you mean 'length_sorted'"),
        ({"eval_sampling_strategy": "random"}, "eval_sampling_strategy='random'"),
        ({"eval_sampling_strategy": "length_sorted", "eval_do_concat_batches": False}, "as they ran"),
        ({"eval_memory_budget_gib": 0}, "greater than 0"),
        ({"eval_memory_budget_gib": 1, "eval_do_concat_batches": False}, "in main memory"),
        ({"eval_memory_budget_gib": float("nan")}, "eval_memory_budget_gib"),
    ],
)
def test_settings_that_cannot_work_are_errors(tmp_path: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainingArguments(str(tmp_path), **arguments)


def test_a_sampler_of_the_user_is_left_alone(tmp_path: Any) -> None:
    class Backwards(torch.utils.data.Sampler[int]):
        order = "backwards"

        def __iter__(self) -> Any:
            return iter(range(26, -1, -1))

        def __len__(self) -> int:
            return 27

    trainer = tagger(tmp_path)
    trainer._get_eval_sampler = lambda dataset: Backwards()
    lengths = [len(row["labels"]) for row in samples()]
    assert (trainer.predict(samples()).label_ids != IGNORED).sum(1).tolist() == lengths[::-1]


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(samples())


def test_sorting_a_stream_is_an_error_that_names_the_argument(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"eval_sampling_strategy='length_sorted' needs the lengths"):
        tagger(tmp_path, eval_sampling_strategy="length_sorted").evaluate(Stream())


def test_a_budget_gives_maps_to_compute_metrics_and_the_same_numbers(tmp_path: Any) -> None:
    kept = []
    for gib in (float("inf"), 1e-7):
        keep = Keep()
        metrics = tagger(tmp_path, keep, eval_memory_budget_gib=gib).evaluate()
        kept.append((keep.prediction, metrics["eval_loss"]))
    (whole, loss), (mapped, same_loss) = kept
    assert loss == same_loss and isinstance(mapped.label_ids, np.memmap) and not isinstance(whole.label_ids, np.memmap)
    assert np.array_equal(whole.label_ids, mapped.label_ids)
    assert [np.array_equal(a, b) for a, b in zip(whole.predictions, mapped.predictions)] == [True, True]
    assert list(tmp_path.iterdir()) == []
