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
