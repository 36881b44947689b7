"""What each batch of an evaluation goes into: the mean loss, and the rows that are kept or shown to a metric.

Owns: `Collector` (one process) and `GatheringCollector` (several): counting samples, losses and rows of a batch, in
that order. Leaves to others: predicting (`predict`), averaging (`losses`), keeping rows (`prediction_store`) or
showing them (`batch_metrics`), many batches at once (`batch_coalescing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainwright import nested
from trainwright.evaluation.batch_metrics import EachBatch
from trainwright.evaluation.losses import EvalLosses, per_sample
from trainwright.evaluation.prediction_store import KeptRows, placed, places_of
from trainwright.evaluation.settings import LoopSettings
from trainwright.loss import targets_of
from trainwright.names import IGNORE_INDEX, closest
from trainwright.nested import Nested, find_batch_size, lists_samples, padding_for, with_room_for

Array = np.ndarray[Any, Any]
AcrossProcesses = Callable[..., Nested]  # (rows of this process, its samples if known) -> rows of all


@dataclass(frozen=True)
class Collected:
    """An evaluation's arrays, each None where nothing came, in the order of the dataset."""

    predictions: Nested
    label_ids: Nested
    inputs: Nested
    losses: Array | None  # (num_samples,), float32
    items: Array | None  # (num_samples,): what each of the losses is a mean of
    num_rows: list[int]  # of each batch, all processes together

    def losses_to_show(self, concat_batches: bool) -> Any:
        """`losses`, or a list with an array per batch where batches are kept apart."""
        if self.losses is None or concat_batches:
            return self.losses
        return np.split(self.losses, np.cumsum(self.num_rows)[:-1])


class Collector:
    """Takes the batches of a single process.

    rows: what predictions and labels go into. main_inputs: inputs -> those that go there with them.
    """

    def __init__(
        self, settings: LoopSettings, rows: KeptRows | EachBatch, main_inputs: Callable[[Any], Nested] | None = None
    ) -> None:
        self.settings = settings
        self.rows = rows
        self.losses = EvalLosses()
        self.num_rows: list[int] = []
        self._main_inputs = main_inputs

    def add(self, inputs: Any, loss: torch.Tensor | None, logits: Nested, labels: Nested) -> None:
        """Take a batch: what the loader gave, and what predicting it returned."""
        num_rows = rows_of(inputs, labels, logits)
        losses = None if loss is None else self._add_loss(loss, self.targets(inputs, labels), num_rows)
        if self.settings.keeps_rows:
            main_inputs = None if self._main_inputs is None else self._main_inputs(inputs)
            self.rows.add(logits, labels, main_inputs, losses, num_rows)
        self.count([num_rows])

    def targets(self, inputs: Any, labels: Nested) -> torch.Tensor | None:
        """The labels that the batch's loss is a mean over; None where each sample is one item."""
        settings = self.settings
        if settings.loss_average != "items":
            return None
        return targets_of(inputs, labels, settings.label_names, settings.labels_are_shifted)

    def _add_loss(self, loss: torch.Tensor, targets: torch.Tensor | None, num_rows: int) -> torch.Tensor | None:
        """Count the loss of a batch; return that of each sample where it is to be shown."""
        if not self.rows.needs_losses:
            self.losses.add_batch(loss, targets, num_rows)
            return None
        losses, items = per_sample(loss, targets, num_rows)
        self.losses.add_samples(losses, items)
        return losses

    def count(self, num_rows: list[int]) -> None:
        """Note that batches of so many rows were taken; move rows to the host where it is time to."""
        self.num_rows += num_rows
        steps = self.settings.accumulation_steps
        if steps is not None and len(self.num_rows) % steps == 0:
            self.rows.to_host()

    def collected(self, limit: int | None, order: Callable[[], Any] | None) -> Collected:
        """All there is, once, after the last batch: at most `limit` samples. Waits for the device.

        order: gives the sample that each row is, or None where they are in order.
        """
        num_rows = sum(self.num_rows)
        num_samples = num_rows if limit is None else min(num_rows, limit)
        ordered = order is not None and self.settings.concat_batches
        places = places_of(order(), num_samples) if ordered and order is not None else None
        predictions, label_ids, inputs = self.rows.arrays(places, num_rows, num_samples)
        losses, items = self.losses.arrays()
        if places is not None and losses is not None and items is not None and len(losses) == num_rows:
            losses, items = placed(losses, places), placed(items, places)
        if losses is not None and items is not None and len(losses) == num_rows:
            losses, items = losses[:num_samples], items[:num_samples]
        return Collected(predictions, label_ids, inputs, losses, items, self.num_rows)


class GatheringCollector(Collector):
    """Takes the batches of several processes: after each one, every process has the rows of all.

    across_processes: rows of this process -> rows of all, see `padded_gather`. gather: the same for rows that are
    equally wide everywhere.
    """

    def __init__(self, *args: Any, gather: Callable[[Nested], Nested], across_processes: AcrossProcesses) -> None:
        super().__init__(*args)
        self._gather, self._across_processes = gather, across_processes

    def add(self, inputs: Any, loss: torch.Tensor | None, logits: Nested, labels: Nested) -> None:
        num_rows = rows_of(inputs, labels, logits)
        losses = main_inputs = None
        if loss is not None:
            losses, items = per_sample(loss, self.targets(inputs, labels), num_rows)
            losses, items = self._gather(torch.stack((losses, items.to(losses.device)), dim=1)).unbind(dim=1)
            self.losses.add_samples(losses, items)
        if self.settings.keeps_rows:
            rows_of_all = losses
            if losses is None and type(logits) is list:  # whose entries may be of samples, so that it tells no number
                leaves: list[Any] = []
                nested.map(leaves.append, logits)
                rows_of_all = self._gather(leaves[0].new_zeros(num_rows))
            main_inputs = None if self._main_inputs is None else self._main_inputs(inputs)
            logits = self._across_processes(logits, num_rows, self.settings.token_padding)
            labels, main_inputs = (self._across_processes(part, num_rows) for part in (labels, main_inputs))
            num_rows = rows_of(rows_of_all, logits, labels, otherwise=num_rows)
            self.rows.add(logits, labels, main_inputs, losses, num_rows)
        else:
            num_rows = rows_of(losses, otherwise=num_rows)
        self.count([num_rows])


def rows_of(*tensors: Nested, otherwise: int = 1) -> int:
    """The samples of a batch: rows of the first of `tensors` that has rows."""
    for candidate in tensors:
        if type(candidate) is torch.Tensor and candidate.ndim:
            return candidate.shape[0]
        if type(candidate) is dict:  # what a collator makes; its first column mostly decides
            for value in candidate.values():
                if type(value) is torch.Tensor and value.ndim:
                    return value.shape[0]
                break
        size = _length_of_lists(candidate)
        if size is None:
            size = find_batch_size(candidate)
        if size is not None:
            return size
    return otherwise


def _length_of_lists(candidate: Nested) -> int | None:
    """The samples of a batch that has a list with an entry for each, such as images of different size, and no tensor;
    None where there is none. A list of tensors alone may be one of outputs.
    """
    if isinstance(candidate, Mapping):
        if any(isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim for value in candidate.values()):
            return None
        return next((len(value) for value in candidate.values() if type(value) is list and value), None)
    if type(candidate) is list and candidate and isinstance(candidate[0], (Mapping, str)):
        return len(candidate)
    return None


def padded_gather(
    gather: Callable[[Nested], Nested],
    pad_across_processes: Callable[..., Nested] | None,
    gather_objects: Callable[[Any], list[Any]] | None = None,
    num_own_rows: Callable[[int], int] | None = None,
) -> AcrossProcesses:
    """(rows of this process, the samples they are of, what pads tokens) -> rows of all; None stays None.

    Rows may be wider elsewhere: they are padded by `pad_across_processes`, in a dtype that has room for the padding.
    A list with an entry per sample (`nested.lists_samples`) is sent as it is, its first `num_own_rows`: two more
    messages per list. Every process has to give the same nesting.
    """

    def across_processes(tensors: Nested, num_rows: int | None = None, token_padding: int | None = None) -> Nested:
        if tensors is None:
            return None
        if type(tensors) is list and gather_objects is not None:
            own = len(tensors) if num_own_rows is None else num_own_rows(len(tensors))
            verdicts = gather_objects(lists_samples(tensors, num_rows))
            if all(verdict is not False for verdict in verdicts) and (any(verdicts) or isinstance(tensors[0], Mapping)):
                mine = nested.map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, tensors[:own])
                return [entry for entries in gather_objects(mine) for entry in entries]
        if isinstance(tensors, (list, tuple, Mapping)):
            return nested.map_items(lambda value: across_processes(value, num_rows, token_padding), tensors)
        if pad_across_processes is not None:
            padding = IGNORE_INDEX
            if isinstance(tensors, torch.Tensor) and tensors.ndim > 1:
                padding = padding_for(tensors.dtype, IGNORE_INDEX, token_padding)
                dtype = with_room_for(tensors.dtype, padding)
                if dtype != tensors.dtype and gather_objects is not None:
                    widths = set(gather_objects(tensors.shape[1]))
                    tensors = tensors if len(widths) == 1 else tensors.to(dtype)  # in all processes alike
            tensors = pad_across_processes(tensors, dim=1, pad_index=padding)
        return gather(tensors)

    return across_processes


def main_input_of(
    name: str, prepare: Callable[[Any], Any] | None, settings: LoopSettings
) -> Callable[[Any], Nested] | None:
    """inputs -> the model's main one, which is kept (with `batch_metrics`, which keep nothing, all inputs), moved by
    `prepare`; None where none is asked for. It raises KeyError for a batch without an input of that name.
    """
    if not settings.include_inputs or not settings.keeps_rows:
        return None

    def main_inputs(inputs: Any) -> Nested:
        if not settings.batch_metrics:
            if name not in inputs:
                raise KeyError(
                    f'include_for_metrics=["inputs"] keeps the model\'s main input {name!r}, but a batch has '
                    f"{list(inputs)}.{closest(name, inputs)} The model names it in `main_input_name`."
                )
            inputs = inputs[name]
        return inputs if prepare is None else prepare(inputs)

    return main_inputs
