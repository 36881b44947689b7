"""What the public methods return.

Owns: the result tuples. Leaves to others: filling them. Imports NumPy for type checkers only.
Source: seed 003 (fields of each tuple), seed 001 (`include_for_metrics`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    Arrays = np.ndarray[Any, Any] | tuple[np.ndarray[Any, Any], ...]
else:
    Arrays = Any


class TrainOutput(NamedTuple):
    """What `Trainer.train` returns. `training_loss` is the mean loss of all updates."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class EvalLoopOutput(NamedTuple):
    """What `evaluation_loop` and `prediction_loop` return; arrays have one row per sample."""

    predictions: Arrays
    label_ids: Arrays | None
    metrics: dict[str, float] | None
    num_samples: int | None


class PredictionOutput(NamedTuple):
    """What `Trainer.predict` returns: an `EvalLoopOutput` without the count."""

    predictions: Arrays
    label_ids: Arrays | None
    metrics: dict[str, float] | None


class BestRun(NamedTuple):
    """What `Trainer.hyperparameter_search` returns; `objective` is a list where several were optimised."""

    run_id: str
    objective: float | list[float]
    hyperparameters: dict[str, Any]
    run_summary: Any | None = None


class EvalPrediction:
    """What `compute_metrics` receives: predictions and labels, and what `include_for_metrics` asked for.

    Unpacks like a tuple (`logits, labels = prediction`) and indexes by position; `inputs` and `losses` take part only
    where they were asked for, in this order.
    """

    def __init__(
        self, predictions: Arrays, label_ids: Arrays, inputs: Arrays | None = None, losses: Arrays | None = None
    ) -> None:
        self.predictions = predictions
        self.label_ids = label_ids
        self.inputs = inputs
        self.losses = losses
        self.elements: tuple[Any, ...] = (predictions, label_ids)
        if inputs is not None:
            self.elements += (inputs,)
        if losses is not None:
            self.elements += (losses,)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.elements)

    def __getitem__(self, index: int) -> Any:
        if not -len(self.elements) <= index < len(self.elements):
            raise IndexError(
                f"EvalPrediction has {len(self.elements)} elements, so there is no index {index}. "
                'TrainingArguments(include_for_metrics=["inputs", "loss"]) adds inputs and losses.'
            )
        return self.elements[index]
