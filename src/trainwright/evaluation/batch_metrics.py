"""A `compute_metrics` that is called with each batch and adds them up itself (`batch_eval_metrics`).

Owns: what it is called with, and holding a batch back until it is known whether it is the last. Leaves to others:
metrics that are objects (`streaming`), which need no such call. Source: seed 001 (`batch_eval_metrics`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainwright.interop.signatures import accepts
from trainwright.nested import Nested
from trainwright.outputs import EvalPrediction


class BatchMetrics:
    """Shows batches to `compute_metrics`, each when the next one is there, so that the last one is known.

    Raises ValueError for a `compute_metrics` that cannot take compute_result.
    """

    def __init__(self, compute_metrics: Callable[..., Any] | None) -> None:
        if compute_metrics is not None and not accepts(compute_metrics, "compute_result"):
            raise ValueError(
                "batch_eval_metrics=True calls compute_metrics(prediction, compute_result=...) after every batch, but "
                f"{getattr(compute_metrics, '__qualname__', compute_metrics)!r} takes no argument compute_result. Add "
                "it: accumulate while it is False, return the metrics of the whole evaluation when it is True."
            )
        self._compute_metrics = compute_metrics
        self._pending: EvalPrediction | None = None

    def add(self, logits: Nested, labels: Nested, inputs: Nested, losses: torch.Tensor | None) -> None:
        """Show a batch; `inputs` and `losses` (num_samples,) where they were asked for."""
        if self._compute_metrics is None or logits is None or labels is None:
            return
        if self._pending is not None:
            self._compute_metrics(self._pending, compute_result=False)
        self._pending = EvalPrediction(logits, labels, inputs, losses)  # type: ignore[arg-type]

    def compute(self) -> dict[str, Any]:
        """The metrics of all batches; empty where no batch had predictions and labels."""
        if self._pending is None or self._compute_metrics is None:
            return {}
        return as_dict(self._compute_metrics(self._pending, compute_result=True), "with compute_result=True ")


def as_dict(metrics: Any, when: str = "") -> dict[str, Any]:
    """What a user's function returned. Raises TypeError unless it is a mapping."""
    if not isinstance(metrics, Mapping):
        message = f"compute_metrics must {when}return a dict such as {{'accuracy': 0.9}}, but returned {metrics!r}."
        raise TypeError(message)
    return dict(metrics)
