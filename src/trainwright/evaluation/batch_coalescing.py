"""Batches in a row that are alike, taken together: a batch costs a look and an append, the rest is done for up to 32.

Owns: when two batches are alike, and how much a run of them may hold. Leaves to others: what becomes of a batch
(`accumulator`), which still takes every batch that is not like the one before it.

Between two batches the processor's caches hold the model, so each Python call there costs a microsecond or more; the
same calls one after the other do not. A run holds what is kept anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainwright.evaluation.accumulator import Collected, Collector, rows_of
from trainwright.evaluation.losses import num_items
from trainwright.evaluation.prediction_store import KeptRows
from trainwright.loss import SHIFTED_LABELS, without_first
from trainwright.nested import Nested

MOST_BATCHES = 32
MOST_BYTES = 2**20  # of predictions and labels that a run holds: where they are larger, calls are no cost, and they
# have to be moved or written out in time

_NOTHING = torch.empty(0)  # stands for what is None, so that everything has the attributes of a tensor


@dataclass(frozen=True, slots=True)
class _Likeness:
    """What the batches of a run have in common."""

    names: list[str]  # of the inputs
    target_name: str | None  # of the input that the items of a loss are counted in; None: there is none
    marks: tuple[Any, ...]
    num_rows: int
    counts: bool  # whether there are items to count; else each sample is one
    most_batches: int


class Runs:
    """Stands in front of a `Collector` of one process that joins batches, and takes them instead of it."""

    def __init__(self, collector: Collector, rows: KeptRows) -> None:
        self._collector, self._rows = collector, rows
        self._settings = collector.settings
        self._keeps_rows = collector.settings.keeps_rows
        self._like: _Likeness | None = None  # None: there is no run
        self._held: list[tuple[Any, ...]] = []  # items (None: not counted yet), loss, logits, labels of each batch
        self._room = 0  # for so many more batches

    def add(self, inputs: Any, loss: torch.Tensor | None, logits: Nested, labels: Nested) -> None:
        """`Collector.add`; a batch that continues the run is only held."""
        like = self._like
        if like is not None and type(inputs) is dict and [*inputs] == like.names:
            marks, batch, targets = self._look_at(inputs, like.target_name, loss, logits, labels)
            if marks == like.marks:
                items = None
                if like.counts and targets is not batch[2]:
                    # At once: a loader may write its next batch to the same memory. Labels that are kept can wait.
                    items = num_items(without_first(targets, self._settings.labels_are_shifted))
                self._held.append((items, *batch))
                self._room -= 1
                if not self._room:
                    self._end()
                return
        self._end()
        self._collector.add(inputs, loss, logits, labels)
        self._like = self._likeness(inputs, loss, logits, labels)
        self._make_room()

    def collected(self, limit: int | None, order: Callable[[], Any] | None) -> Collected:
        """`Collector.collected`."""
        self._end()
        return self._collector.collected(limit, order)

    def _look_at(
        self, inputs: Any, target_name: str | None, loss: Any, logits: Nested, labels: Nested
    ) -> tuple[tuple[Any, ...], tuple[Any, Any, Any], Any]:
        """What is equal for batches that are alike, empty for one in no run; loss, logits and labels that are kept; the
        targets.
        """
        if loss is None:
            loss = _NOTHING
        if logits is None or not self._keeps_rows:
            logits = _NOTHING
        if labels is None or not self._keeps_rows:
            labels = _NOTHING
        targets = _NOTHING if target_name is None else inputs[target_name]
        if not type(loss) is type(logits) is type(labels) is type(targets) is torch.Tensor:
            return (), (loss, logits, labels), targets
        marks = (
            targets is labels, targets.shape, targets.dtype, loss.ndim, loss.requires_grad,
            logits.shape, logits.dtype, logits.requires_grad, labels.shape, labels.dtype,
        )  # fmt: skip
        return marks, (loss, logits, labels), targets

    def _likeness(self, inputs: Any, loss: Any, logits: Nested, labels: Nested) -> _Likeness | None:
        """What other batches must have in common with this one to be in a run with it; None where none can be."""
        settings = self._settings
        if type(inputs) is not dict or not inputs or SHIFTED_LABELS in inputs:
            return None
        names = [name for name in settings.label_names if name in inputs]
        if not names and labels is not None:  # the loss may be a mean over labels that are not among the inputs
            return None
        target_name = names[0] if len(names) == 1 and settings.loss_average == "items" else None
        marks, batch, targets = self._look_at(inputs, target_name, loss, logits, labels)
        if not marks or any(tensor.requires_grad for tensor in batch) or (loss is not None and loss.ndim):
            return None
        num_rows = rows_of(inputs, labels, logits)
        if num_rows not in [tensor.shape[0] for tensor in (*batch[1:], targets) if tensor.ndim]:
            return None  # samples are not the rows of anything that is compared
        kept = [tensor for tensor in batch[1:] if tensor is not _NOTHING]
        # A slice keeps all of what it is a slice of alive, so it cannot wait. Asked of the first batch only: a model
        # that returns a slice of its outputs does so each time.
        if not all(tensor.ndim for tensor in kept) or batch[1].untyped_storage().nbytes() > batch[1].nbytes:
            return None
        most = min(MOST_BATCHES, MOST_BYTES // max(1, sum(tensor.nbytes for tensor in kept)))
        if settings.accumulation_steps is not None:
            most = min(most, settings.accumulation_steps)
        if most < 2:
            return None
        counts = loss is not None and self._collector.targets(inputs, labels) is not None
        return _Likeness([*inputs], target_name, marks, num_rows, counts, most)

    def _make_room(self) -> None:
        """Let the run end where rows are moved to the host, at the latest."""
        if self._like is None:
            return
        self._room, steps = self._like.most_batches, self._settings.accumulation_steps
        if steps is not None:
            self._room = min(self._room, steps - len(self._collector.num_rows) % steps)

    def _end(self) -> None:
        """Hand over what the run holds, and begin the next one with batches like these."""
        like, held = self._like, self._held
        if like is None or not held:
            return
        self._held = []
        items, losses, logits, labels = zip(*held)
        if losses[0] is not _NOTHING:
            counted = self._counted(items, labels) if like.counts else None
            self._collector.losses.add_batches(torch.stack(losses), counted, like.num_rows)
        if self._keeps_rows:
            self._rows.add_alike(
                None if logits[0] is _NOTHING else logits, None if labels[0] is _NOTHING else torch.cat(labels)
            )
        self._collector.count([like.num_rows] * len(held))
        self._make_room()

    def _counted(self, items: Sequence[Any], labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """The items of each batch (batches,), counted now where they were not yet."""
        if items[0] is not None:
            return torch.stack(items)  # type: ignore[arg-type]
        targets = without_first(torch.cat(labels), self._settings.labels_are_shifted)  # type: ignore[arg-type]
        return num_items(targets.reshape(len(labels), -1), each_row=True)
