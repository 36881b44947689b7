"""Several batches in a row that are alike, appended at once: a batch costs a comparison, the rest is done for up to 32.

Owns: when two batches are alike, and how much a group of them may hold. Leaves to others: appending one batch
(`accumulator`), as is done with every batch that is not like the one before it.

Between two batches the processor's caches hold the model, so each Python call there costs a microsecond or more; the
same calls one after the other do not. A group only holds what is stored anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainwright.evaluation.accumulator import Accumulated, Accumulator, LoopSettings, rows_of
from trainwright.evaluation.losses import num_items
from trainwright.loss import SHIFTED_LABELS, without_first
from trainwright.nested import Nested

MOST_BATCHES = 32
MOST_BYTES = 2**20  # of predictions and labels that a group holds: where they are larger, calls are no cost, and they
# have to be moved or written out in time

_NOTHING = torch.empty(0)  # in place of None, so that everything has the attributes of a tensor


@dataclass(frozen=True, slots=True)
class _Alike:
    """What the batches of a group have in common."""

    names: list[str]  # of the inputs
    target_name: str | None  # of the input that the items of a loss are counted in; None: there is none
    features: tuple[Any, ...]
    num_rows: int
    counts: bool  # whether there are items to count; else each sample is one
    most_batches: int


class CoalescingAccumulator(Accumulator):
    """An `Accumulator` that appends batches in groups: where `shortcuts.can_coalesce`."""

    def __init__(self, settings: LoopSettings, **others: Any) -> None:
        super().__init__(settings, **others)
        self._alike: _Alike | None = None  # None: there is no group
        self._group: list[tuple[Any, ...]] = []  # items (None: not counted yet), loss, logits, labels of each batch
        self._room = 0  # for so many more batches

    def add(self, inputs: Any, loss: torch.Tensor | None, logits: Nested, labels: Nested) -> None:
        """`Accumulator.add`; a batch that continues the group is only held."""
        alike = self._alike
        if alike is not None and type(inputs) is dict and [*inputs] == alike.names:
            features, batch, targets = self._features(inputs, alike.target_name, loss, logits, labels)
            if features == alike.features:
                items = None
                if alike.counts and targets is not batch[2]:
                    # At once: a loader may write its next batch to the same memory. Labels that are stored can wait.
                    items = num_items(without_first(targets, self.settings.labels_are_shifted))
                self._group.append((items, *batch))
                self._room -= 1
                if not self._room:
                    self._end_group()
                return
        self._end_group()
        super().add(inputs, loss, logits, labels)
        self._alike = self._begin_group(inputs, loss, logits, labels)
        self._make_room()

    def result(self, limit: int | None, order: Callable[[], Any]) -> Accumulated:
        """`Accumulator.result`."""
        self._end_group()
        return super().result(limit, order)

    def _features(
        self, inputs: Any, target_name: str | None, loss: Any, logits: Nested, labels: Nested
    ) -> tuple[tuple[Any, ...], tuple[Any, Any, Any], Any]:
        """What is equal for batches that are alike, empty for one in no group; loss, logits and labels to be stored;
        the targets.
        """
        if loss is None:
            loss = _NOTHING
        if logits is None or not self._stores:
            logits = _NOTHING
        if labels is None or not self._stores:
            labels = _NOTHING
        targets = _NOTHING if target_name is None else inputs[target_name]
        if not type(loss) is type(logits) is type(labels) is type(targets) is torch.Tensor:
            return (), (loss, logits, labels), targets
        features = (
            targets is labels, targets.shape, targets.dtype, loss.ndim, loss.requires_grad,
            logits.shape, logits.dtype, logits.requires_grad, labels.shape, labels.dtype,
        )  # fmt: skip
        return features, (loss, logits, labels), targets

    def _begin_group(self, inputs: Any, loss: torch.Tensor | None, logits: Nested, labels: Nested) -> _Alike | None:
        """What other batches must have in common with this one to be in a group with it; None where none can be."""
        settings = self.settings
        if type(inputs) is not dict or not inputs or SHIFTED_LABELS in inputs:
            return None
        names = [name for name in settings.label_names if name in inputs]
        if not names and labels is not None:  # the loss may be a mean over labels that are not among the inputs
            return None
        target_name = names[0] if len(names) == 1 and settings.loss_average == "items" else None
        features, batch, targets = self._features(inputs, target_name, loss, logits, labels)
        if not features or any(tensor.requires_grad for tensor in batch) or (loss is not None and loss.ndim):
            return None
        num_rows = rows_of(inputs, labels, logits)
        if num_rows not in [tensor.shape[0] for tensor in (*batch[1:], targets) if tensor.ndim]:
            return None  # samples are not the rows of anything that is compared
        stored = [tensor for tensor in batch[1:] if tensor is not _NOTHING]
        # A slice keeps all of what it is a slice of alive, so it cannot wait. Asked of the first batch only: a model
        # that returns a slice of its outputs does so each time.
        if not all(tensor.ndim for tensor in stored) or batch[1].untyped_storage().nbytes() > batch[1].nbytes:
            return None
        most = min(MOST_BATCHES, MOST_BYTES // max(1, sum(tensor.nbytes for tensor in stored)))
        if settings.accumulation_steps is not None:
            most = min(most, settings.accumulation_steps)
        if most < 2:
            return None
        counts = loss is not None and self.targets(inputs, labels) is not None
        return _Alike([*inputs], target_name, features, num_rows, counts, most)

    def _make_room(self) -> None:
        """Let the group end where rows are moved to the host, at the latest."""
        if self._alike is None:
            return
        self._room, steps = self._alike.most_batches, self.settings.accumulation_steps
        if steps is not None:
            self._room = min(self._room, steps - len(self.num_rows) % steps)

    def _end_group(self) -> None:
        """Append what the group holds, and begin the next one with batches like these."""
        alike, group = self._alike, self._group
        if alike is None or not group:
            return
        self._group = []
        items, losses, logits, labels = zip(*group)
        if losses[0] is not _NOTHING:
            counted = self._counted(items, labels) if alike.counts else None
            self.losses.add_batches(torch.stack(losses), counted, alike.num_rows)
        if logits[0] is not _NOTHING:
            self.predictions.add_alike(logits)
        if labels[0] is not _NOTHING:
            self.label_ids.add(torch.cat(labels))
        self.count([alike.num_rows] * len(group))
        self._make_room()

    def _counted(self, items: Sequence[Any], labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """The items of each batch (batches,), counted now where they were not yet."""
        if items[0] is not None:
            return torch.stack(items)  # type: ignore[arg-type]
        targets = without_first(torch.cat(labels), self.settings.labels_are_shifted)  # type: ignore[arg-type]
        return num_items(targets.reshape(len(labels), -1), each_row=True)
