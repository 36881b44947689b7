"""Rows that outlive their batch: predictions, labels and inputs, and the order in which they leave.

Owns: the three containers of an evaluation, cutting off repeated samples, the order of the dataset. Leaves to others:
joining rows (`buffers`), losses (`losses`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainwright.evaluation.buffers import EvalLoopContainer
from trainwright.evaluation.spill import MemoryBudget
from trainwright.nested import Nested

Array = np.ndarray[Any, Any]


class KeptRows:
    """Predictions, labels and inputs of all batches."""

    needs_losses = False  # they are asked for at the end

    def __init__(self, concat_batches: bool, budget: MemoryBudget | None, token_padding: int | None = None) -> None:
        self._containers = [
            EvalLoopContainer(concat_batches, budget=budget, token_padding=padding)
            for padding in (token_padding, None, None)
        ]

    def add(
        self, logits: Nested, labels: Nested, main_inputs: Nested, losses: Any = None, num_rows: int | None = None
    ) -> None:
        """Append a batch of `num_rows` samples."""
        predictions, label_ids, inputs = self._containers
        predictions.add(logits, num_rows)
        label_ids.add(labels, num_rows)
        inputs.add(main_inputs, num_rows)

    def add_alike(self, logits: Sequence[torch.Tensor] | None, labels: torch.Tensor | None) -> None:
        """Batches whose logits have one shape and dtype, none of them a slice; the labels of all in one."""
        predictions, label_ids, _ = self._containers
        if logits is None:
            predictions.add(None)
        else:
            predictions.add_alike(logits)
        label_ids.add(labels)

    def to_host(self) -> None:
        for container in self._containers:
            container.to_cpu_and_numpy()

    def arrays(self, places: Array | None, num_rows: int, num_samples: int) -> tuple[Nested, ...]:
        """Predictions, labels and inputs, None where nothing came; each row at its place, where `places` says it.

        Of `num_rows` rows the first `num_samples` are returned; of rows that are no samples (one per token) all.
        """
        return tuple(container.get_arrays(places, num_rows, num_samples) for container in self._containers)


def places_of(sampled: Any, num_samples: int) -> Array | None:
    """Where each of the first `num_samples` rows belongs, if row i is sample `sampled[i]`; None where that is unknown.

    A loader that drops its last batch leaves samples out; the others close up.
    """
    if sampled is None or len(sampled) < num_samples:
        return None
    by_sample = np.argsort(np.asarray(sampled)[:num_samples], kind="stable")
    places = np.empty_like(by_sample)
    places[by_sample] = np.arange(num_samples)
    return places


def placed(values: Array, places: Array) -> Array:
    result = np.empty_like(values, shape=places.shape)
    result[places] = values[: len(places)]
    return result
