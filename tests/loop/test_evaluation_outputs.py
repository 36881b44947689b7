"""What an evaluation keeps of a batch: which outputs are predictions, entries of single samples, what pads them."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainwright import Trainer

NUM_SAMPLES, NUM_CLASSES = 7, 3
Named = namedtuple("Named", ["logits", "hidden"])


def rows(num_samples: int = NUM_SAMPLES) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.tensor([float(i), 1.0]), "labels": torch.tensor(i % NUM_CLASSES)} for i in range(num_samples)]


class Classifier(nn.Module):
    """Logits in a form of its own; with labels it puts its loss in front."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, NUM_CLASSES)
        self.form = form

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.linear(x)
        return self.form(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)

    def logits(self) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return self.linear(torch.stack([row["x"] for row in rows()])).numpy()


# loss or None, logits -> what the model returns; and whether it is the logits alone, or with their doubles
FORMS: dict[str, tuple[Any, bool]] = {
    "a tuple": (lambda loss, logits: (logits,) if loss is None else (loss, logits), True),
    "a tuple of two": (
        lambda loss, logits: (logits, 2 * logits) if loss is None else (loss, logits, 2 * logits),
        False,
    ),
    "a tuple with None in place of the loss": (lambda loss, logits: (loss, logits), True),
    "a list": (lambda loss, logits: [logits] if loss is None else [loss, logits], True),
    "a named tuple": (lambda loss, logits: Named(logits, 2 * logits), False),
    "a dict": (lambda loss, logits: {"loss": loss, "logits": logits}, True),
    "a dict without loss": (lambda loss, logits: {"logits": logits}, True),
    "a tensor": (lambda loss, logits: logits, True),
    "an object": (lambda loss, logits: SimpleNamespace(logits=logits, doubles=2 * logits), False),
}


def cross_entropy_of(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    if isinstance(outputs, dict):
        logits = outputs["logits"]
    elif isinstance(outputs, SimpleNamespace):
        logits = outputs.logits
    elif isinstance(outputs, torch.Tensor):
        logits = outputs
    else:
        logits = next(value for value in outputs if value is not None and value.ndim == 2)
    return nn.functional.cross_entropy(logits, labels)


class TakesLabelsOut(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy_of(outputs, labels)
        return (loss, outputs) if return_outputs else loss


class NamesInputs(Trainer):
    """Leaves the labels where they are, and gives the model its inputs by name."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(x=inputs["x"])
        loss = cross_entropy_of(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Doubles(Trainer):
    """Changes the loss that the model computed, so that it is another tensor than the one in the outputs."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss


OWN_LOSSES: dict[str, Any] = {
    "compute_loss_func": (Trainer, {"compute_loss_func": cross_entropy_of}),
    "an override that takes labels out": (TakesLabelsOut, {}),
    "an override that names inputs": (NamesInputs, {}),
}


@pytest.mark.parametrize("own_loss", OWN_LOSSES)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_cut_off_where_the_model_was_given_no_labels(make_trainer: Any, form: str, own_loss: str) -> None:
    make, is_alone = FORMS[form]
    cls, given = OWN_LOSSES[own_loss]
    model = Classifier(make)
    trainer = make_trainer(trainer={"model": model, **given}, cls=cls, per_device_eval_batch_size=4)
    output = trainer.predict(rows())
    logits = model.logits()
    expected = [logits] if is_alone else [logits, 2 * logits]
    found = [output.predictions] if is_alone else list(output.predictions)
    assert [array.shape for array in found] == [(NUM_SAMPLES, NUM_CLASSES)] * len(expected)
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    labels = torch.tensor([int(row["labels"]) for row in rows()])
    loss = nn.functional.cross_entropy(torch.from_numpy(logits), labels).item()
    assert output.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("form", ["a tuple", "a tuple of two", "a dict"])
def test_label_smoothing_cuts_nothing_off_either(make_trainer: Any, form: str) -> None:
    make, is_alone = FORMS[form]
    model = Classifier(make)
    trainer = make_trainer(trainer={"model": model}, label_smoothing_factor=0.1, per_device_eval_batch_size=4)
    predictions = trainer.predict(rows()).predictions
    np.testing.assert_allclose(predictions if is_alone else predictions[0], model.logits(), rtol=1e-6)


@pytest.mark.parametrize("cls", [Trainer, Doubles])
@pytest.mark.parametrize("form", ["a tuple", "a tuple of two", "a list", "a dict"])
def test_a_loss_that_the_model_returned_is_no_prediction(make_trainer: Any, form: str, cls: type) -> None:
    make, is_alone = FORMS[form]
    model = Classifier(make)
    trainer = make_trainer(trainer={"model": model}, cls=cls, per_device_eval_batch_size=4)
    predictions = trainer.predict(rows()).predictions
    assert is_alone or len(predictions) == 2
    np.testing.assert_allclose(predictions if is_alone else predictions[0], model.logits(), rtol=1e-6)


def test_the_memory_of_a_model_without_labels_is_one_place_earlier(make_trainer: Any) -> None:
    received = []

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, NUM_CLASSES)

        def forward(self, x: Any, labels: Any = None, mems: Any = None) -> Any:
            received.append(None if mems is None else mems.item())
            return self.linear(x), torch.tensor(float(len(received)))

    trainer = make_trainer(
        trainer={"model": Recurrent(), "compute_loss_func": cross_entropy_of},
        past_index=2,
        per_device_eval_batch_size=3,
    )
    trainer.evaluate(rows())
    assert received == [None, 1.0, 2.0]


# ------------------------------------------------------------------------------------ entries of single samples ----


class Detector(nn.Module):
    """Scores of two queries for each image, and with `per_image` the boxes it finds, as many as the image has."""

    main_input_name = "pixels"

    def __init__(self, per_image: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2)
        self.per_image = per_image

    def forward(self, pixels: torch.Tensor, labels: Any = None) -> Any:
        scores = self.linear(pixels)  # (batch, 2)
        outputs: dict[str, Any] = {"scores": scores}
        if self.per_image:
            outputs["boxes"] = [{"boxes": row[None].repeat(num_boxes(row), 1), "name": name(row)} for row in pixels]
        if labels is not None:
            outputs = {"loss": scores.mean() + sum(label["boxes"].mean() for label in labels), **outputs}
        return outputs


def num_boxes(pixels: torch.Tensor) -> int:
    return 1 + int(pixels[0]) % 3


def name(pixels: torch.Tensor) -> str:
    return f"image {int(pixels[0])}"


def images(num_samples: int = NUM_SAMPLES) -> list[dict[str, Any]]:
    samples = []
    for index in range(num_samples):
        pixels = torch.tensor([float(index), 1.0, 2.0, 3.0])
        boxes = index + torch.arange(4.0 * num_boxes(pixels)).reshape(-1, 4)
        label = {"image_id": torch.tensor([index]), "boxes": boxes, "class_labels": torch.arange(len(boxes))}
        samples.append({"pixels": pixels, "labels": label, "ids": range((index * 5) % 7)})
    return samples


def collate_images(samples: list[dict[str, Any]]) -> dict[str, Any]:
    pixels = torch.stack([sample["pixels"] for sample in samples])
    return {"pixels": pixels, "labels": [sample["labels"] for sample in samples]}


def assert_same_entries(found: Any, expected: list[dict[str, Any]]) -> None:
    assert type(found) is list and len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, str):
                assert one[key] == value
            else:
                assert isinstance(one[key], np.ndarray)
                np.testing.assert_array_equal(one[key], value.numpy())


IN_EVERY_WAY: dict[str, dict[str, Any]] = {
    "plain": {},
    "one image a batch": {"per_device_eval_batch_size": 1},
    "moved to the host": {"eval_accumulation_steps": 1},
    "beyond the memory budget": {"eval_memory_budget_gib": 1e-9},
    "sorted by length": {"eval_sampling_strategy": "length_sorted"},
    "grouped": {"eval_sampling_strategy": "group_by_length"},
    "found batch sizes": {"auto_find_batch_size": True},
}


@pytest.mark.parametrize("arguments", IN_EVERY_WAY.values(), ids=list(IN_EVERY_WAY))
def test_a_list_of_samples_has_an_entry_for_each_in_order(make_trainer: Any, arguments: dict[str, Any]) -> None:
    data, seen = images(), []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions, prediction.label_ids))
        return {}

    trainer = make_trainer(
        trainer={
            "model": Detector(per_image=True), "data_collator": collate_images, "train_dataset": data,
            "eval_dataset": data, "compute_metrics": metrics,
        },
        **{"remove_unused_columns": False, "per_device_eval_batch_size": 4, **arguments},
    )  # fmt: skip
    trainer._length_input_name = lambda: "ids"
    trainer.evaluate()
    output = trainer.predict(data)
    pixels = torch.stack([sample["pixels"] for sample in data])
    boxes = [{"boxes": row[None].repeat(num_boxes(row), 1), "name": name(row)} for row in pixels]
    for (scores, found), labels in [*seen, (output.predictions, output.label_ids)]:
        assert_same_entries(labels, [sample["labels"] for sample in data])
        assert_same_entries(found, boxes)
        with torch.no_grad():
            np.testing.assert_allclose(scores, trainer.model.linear(pixels).numpy(), rtol=1e-5)
    assert len(seen) == 2


def test_batches_that_are_kept_apart_keep_their_lists(make_trainer: Any) -> None:
    data = images()
    trainer = make_trainer(
        trainer={"model": Detector(), "data_collator": collate_images},
        remove_unused_columns=False,
        per_device_eval_batch_size=4,
        eval_do_concat_batches=False,
    )
    labels = trainer.predict(data).label_ids
    assert [len(batch) for batch in labels] == [4, 3]
    assert_same_entries(labels[0] + labels[1], [sample["labels"] for sample in data])


class Masks(nn.Module):
    """Takes images of different size as a list, and returns nothing but a list with a mask of each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: list[torch.Tensor], masks: Any = None, classes: Any = None) -> Any:
        found = [image * self.weight for image in images]
        if masks is None:
            return {"found": found}
        return {"loss": self.weight * torch.stack([mask.sum() for mask in masks]).mean(), "found": found}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
@pytest.mark.parametrize("with_labels", [True, False])
def test_lists_of_tensors_of_different_size_have_an_entry_for_each_sample(
    make_trainer: Any, batch_size: int, with_labels: bool
) -> None:
    sizes = [2, 2, 3, 4, 2, 5, 1]
    data = [{"images": torch.full((size, 3), float(i))} for i, size in enumerate(sizes)]
    if with_labels:
        for row in data:
            row.update(masks=(row["images"] > 2).float(), classes=torch.arange(len(row["images"])))
    trainer = make_trainer(
        trainer={
            "model": Masks(), "data_collator": lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
        },
        label_names=["masks", "classes"], per_device_eval_batch_size=batch_size,
    )  # fmt: skip
    output = trainer.predict(data)
    columns = [(output.predictions, "images")]
    if with_labels:
        columns += list(zip(output.label_ids, ["masks", "classes"]))
        loss = sum(row["masks"].sum().item() for row in data) / len(data)
        assert output.metrics["test_loss"] == pytest.approx(loss)
    for found, column in columns:
        assert [array.tolist() for array in found] == [row[column].tolist() for row in data]


def test_a_list_that_is_the_whole_output_has_an_entry_for_each_sample(make_trainer: Any) -> None:
    class Finds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, pixels: torch.Tensor) -> Any:
            return [{"boxes": row[None].repeat(num_boxes(row), 1)} for row in pixels]

    data = [{"pixels": sample["pixels"]} for sample in images()]
    found = make_trainer(trainer={"model": Finds()}, per_device_eval_batch_size=2).predict(data).predictions
    assert_same_entries(found, [{"boxes": row["pixels"][None].repeat(num_boxes(row["pixels"]), 1)} for row in data])


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_list_of_outputs_stays_one_whatever_the_batch_size(make_trainer: Any, batch_size: int) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return {"heads": [self.linear(x), 2 * self.linear(x)]}

    model, data = Heads(), [{"x": row["x"]} for row in rows(8)]
    heads = make_trainer(trainer={"model": model}, per_device_eval_batch_size=batch_size).predict(data).predictions
    with torch.no_grad():
        logits = model.linear(torch.stack([row["x"] for row in data])).numpy()
    assert len(heads) == 2
    for found, expected in zip(heads, (logits, 2 * logits)):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_list_that_is_of_samples_in_some_batches_only_is_an_error(make_trainer: Any) -> None:
    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, pixels: torch.Tensor) -> Any:
            return {"found": [row[: num_boxes(row)] for row in pixels][:4]}

    data = [{"pixels": sample["pixels"]} for sample in images(12)]
    trainer = make_trainer(trainer={"model": Forgets()}, per_device_eval_batch_size=4)
    assert len(trainer.predict(data).predictions) == 12
    batches = list(trainer.get_test_dataloader(data))
    batches[1] = {"pixels": torch.cat([batches[1]["pixels"], batches[2]["pixels"]])}
    with pytest.raises(ValueError, match="an entry for each sample, a later batch of 8 samples gave 4 entries"):
        trainer.evaluation_loop(batches, "Prediction")


# -------------------------------------------------------------------------------------------- what pads rows ----


class Ragged(nn.Module):
    """Its input in another dtype, as wide as the batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> Any:
        return {"x": x.to(self.dtype)}


PADDED = {
    torch.bool: np.int8, torch.uint8: np.int16, torch.int8: np.int8, torch.uint16: np.int32, torch.int16: np.int16,
    torch.uint32: np.int64, torch.int64: np.int64, torch.float16: np.float16, torch.bfloat16: np.float32,
    torch.complex64: np.complex64, torch.float8_e4m3fn: np.float32,
}  # fmt: skip


@pytest.mark.parametrize("arguments", [{}, {"eval_accumulation_steps": 1}, {"eval_memory_budget_gib": 1e-9}])
@pytest.mark.parametrize("dtype", PADDED, ids=str)
def test_what_pads_rows_is_no_value_of_theirs(make_trainer: Any, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    widths = [2, 3, 2, 4]
    data = [{"x": torch.ones(width)} for width in widths]
    trainer = make_trainer(trainer={"model": Ragged(dtype)}, per_device_eval_batch_size=1, **arguments)
    found = trainer.predict(data).predictions
    assert found.dtype == PADDED[dtype]
    assert found.tolist() == [[1] * width + [-100] * (4 - width) for width in widths]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_rows_of_one_width_keep_their_dtype(make_trainer: Any, dtype: torch.dtype) -> None:
    trainer = make_trainer(trainer={"model": Ragged(dtype)}, per_device_eval_batch_size=2)
    found = trainer.predict([{"x": torch.ones(3)}] * 5).predictions
    assert found.dtype == (np.bool_ if dtype is torch.bool else np.uint8) and found.all() and found.shape == (5, 3)


def test_the_largest_integers_have_no_type_with_room_for_padding(make_trainer: Any) -> None:
    trainer = make_trainer(trainer={"model": Ragged(torch.uint64)}, per_device_eval_batch_size=1)
    assert trainer.predict([{"x": torch.ones(3)}] * 2).predictions.dtype == np.uint64
    with pytest.raises(ValueError, match=r"uint64 differ in width.*preprocess_logits_for_metrics"):
        trainer.predict([{"x": torch.ones(3)}, {"x": torch.ones(2)}])


# ------------------------------------------------------------------------------------- a metric of each batch ----


@pytest.mark.parametrize("concatenates", [True, False])
def test_predict_returns_predictions_also_where_a_metric_sees_each_batch(make_trainer: Any, concatenates: bool) -> None:
    sizes = []

    def metrics(prediction: Any, compute_result: bool) -> dict[str, float]:
        sizes.append(len(prediction.predictions))
        return {"rows": float(sum(sizes))}

    model = Classifier(FORMS["a dict"][0])
    trainer = make_trainer(
        trainer={"model": model, "compute_metrics": metrics, "eval_dataset": rows()}, batch_eval_metrics=True,
        per_device_eval_batch_size=4, eval_do_concat_batches=concatenates,
    )  # fmt: skip
    output = trainer.predict(rows())
    assert sizes == [4, 3] and output.metrics["test_rows"] == NUM_SAMPLES
    found, labels = output.predictions, output.label_ids
    if not concatenates:
        found, labels = np.concatenate(found), np.concatenate(labels)
    np.testing.assert_allclose(found, model.logits(), rtol=1e-6)
    assert labels.tolist() == [int(row["labels"]) for row in rows()]


def test_evaluate_drops_predictions_that_a_metric_has_seen_and_a_loop_called_by_hand_keeps_them(
    make_trainer: Any,
) -> None:
    outputs = []

    class Watches(Trainer):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            outputs.append(super().evaluation_loop(*args, **kwargs))
            return outputs[-1]

    trainer = make_trainer(
        trainer={
            "model": Classifier(FORMS["a dict"][0]), "eval_dataset": rows(),
            "compute_metrics": lambda prediction, compute_result: {},
        },
        cls=Watches, batch_eval_metrics=True, per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.evaluate()
    trainer.evaluation_loop(trainer.get_eval_dataloader(), "by hand")
    assert outputs[0].predictions is None and outputs[1].predictions.shape == (NUM_SAMPLES, NUM_CLASSES)
