"""An evaluation of several processes: each has the rows of all after each batch.

Owns: gathering rows that differ in width or are lists (`padded_gather`), the accumulator that does so after each batch,
and predicting a batch without the samples that a loader repeated to fill the last round: they take no part in a mean
loss, and a model gives one loss per batch, so nothing can be taken out of it later. Leaves to others: which rows those
are, and leaving them out of what is gathered (the strategy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainwright import nested
from trainwright.evaluation.accumulator import Accumulator, LoopSettings, rows_of
from trainwright.evaluation.losses import per_sample
from trainwright.names import IGNORE_INDEX
from trainwright.nested import Nested, lists_samples, padding_for, with_room_for
from trainwright.splitting import CannotSplit, first_rows, num_samples

if TYPE_CHECKING:
    from trainwright.parallel.strategy import Strategy

AcrossProcesses = Callable[..., Nested]  # (rows of this process, its samples if known) -> rows of all


class GatheringAccumulator(Accumulator):
    """Adds up the batches of several processes: after each one, every process has the rows of all.

    across_processes: rows of this process -> rows of all, see `padded_gather`. gather: the same for rows that are
    equally wide everywhere.
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        gather: Callable[[Nested], Nested],
        across_processes: AcrossProcesses,
        **others: Any,
    ) -> None:
        super().__init__(settings, **others)
        self._gather, self._across_processes = gather, across_processes

    def add(self, inputs: Any, loss: torch.Tensor | None, logits: Nested, labels: Nested) -> None:
        num_rows = rows_of(inputs, labels, logits)
        losses = main_inputs = None
        if loss is not None:
            losses, items = per_sample(loss, self.targets(inputs, labels), num_rows)
            losses, items = self._gather(torch.stack((losses, items.to(losses.device)), dim=1)).unbind(dim=1)
            self.losses.add_samples(losses, items)
        if self._uses_rows:
            rows_of_all = losses
            if losses is None and type(logits) is list:  # whose entries may be of samples, so that it tells no number
                leaves: list[Any] = []
                nested.map(leaves.append, logits)
                rows_of_all = self._gather(leaves[0].new_zeros(num_rows))
            main_inputs = None if self._main_inputs is None else self._main_inputs(inputs)
            logits = self._across_processes(logits, num_rows, self.settings.token_padding)
            labels, main_inputs = (self._across_processes(part, num_rows) for part in (labels, main_inputs))
            num_rows = rows_of(rows_of_all, logits, labels, otherwise=num_rows)
            self.add_rows(logits, labels, main_inputs, losses, num_rows)
        else:
            num_rows = rows_of(losses, otherwise=num_rows)
        self.count([num_rows])


def padded_gather(strategy: Strategy, num_own_rows: Callable[[int], int]) -> AcrossProcesses:
    """(rows of this process, the samples they are of, what pads tokens) -> rows of all; None stays None.

    Rows may be wider elsewhere: they are padded, in a dtype that has room for the padding. A list with an entry per
    sample (`nested.lists_samples`) is sent as it is, its first `num_own_rows`: two more messages per list. Every
    process has to give the same nesting.
    """

    def across_processes(tensors: Nested, num_rows: int | None = None, token_padding: int | None = None) -> Nested:
        if tensors is None:
            return None
        if type(tensors) is list:
            verdicts = strategy.gather_objects(lists_samples(tensors, num_rows))
            if all(verdict is not False for verdict in verdicts) and (any(verdicts) or isinstance(tensors[0], Mapping)):
                own = tensors[: num_own_rows(len(tensors))]
                own = nested.map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, own)
                return [entry for entries in strategy.gather_objects(own) for entry in entries]
        if isinstance(tensors, (list, tuple, Mapping)):
            return nested.map_items(lambda value: across_processes(value, num_rows, token_padding), tensors)
        padding = IGNORE_INDEX
        if isinstance(tensors, torch.Tensor) and tensors.ndim > 1:
            padding = padding_for(tensors.dtype, IGNORE_INDEX, token_padding)
            dtype = with_room_for(tensors.dtype, padding)
            if dtype != tensors.dtype:
                widths = set(strategy.gather_objects(tensors.shape[1]))
                tensors = tensors if len(widths) == 1 else tensors.to(dtype)  # in all processes alike
        return strategy.gather_for_metrics(strategy.pad_across_processes(tensors, dim=1, pad_index=padding))

    return across_processes


def predict_without_repeats(
    inputs: Any, predict_batch: Callable[[Any], tuple[Any, Nested, Nested]], num_own_rows: Callable[[int], int]
) -> tuple[Any, Nested, Nested]:
    """(loss, logits, labels) of a batch, the loss that of its first `num_own_rows(rows)` rows: the others are repeated.

    Logits and labels keep the number of rows that gathering expects: the last own row is in place of the repeated ones.
    A batch without an own row, and one whose rows cannot be told apart, is predicted as it is.
    """
    try:
        num_rows = num_samples(inputs)
    except CannotSplit:
        return predict_batch(inputs)
    own = num_own_rows(num_rows)
    if own in (0, num_rows):
        return predict_batch(inputs)
    loss, logits, labels = predict_batch(first_rows(inputs, own))

    def filled(tensor: Any) -> Any:
        if lists_samples(tensor, own):
            return tensor + tensor[-1:] * (num_rows - own)
        if isinstance(tensor, (list, tuple, Mapping)):
            return nested.map_items(filled, tensor)
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or len(tensor) != own:
            return tensor
        return torch.cat([tensor, tensor[-1:].expand(num_rows - own, *tensor.shape[1:])])

    return loss, filled(logits), filled(labels)
