"""What each micro-batch weighs in the update it is a part of.

Owns: counting the items of micro-batches without a read from the device, the divisor of each loss, micro-batches
without any item. Leaves to others: which labels are items (`loss`), computing losses (Trainer).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from trainwright.loss import SHIFTED_LABELS, targets_of
from trainwright.names import IGNORE_INDEX
from trainwright.nested import find_batch_size

# What the loss of a micro-batch is: the mean over its items, its share of the update's loss (divided by the items of
# the whole update), or what an override of compute_loss returns, which is divided by the number of micro-batches.
LossKind = Literal["mean", "share", "override"]


NO_ITEMS = (
    "No label of step %s takes part in the loss: all of them are -100. Nothing can be learnt from it, so the weights, "
    "the optimizer and the schedule are left as they are; the step is counted. Further such steps are not named."
)


class Weight(NamedTuple):
    """What becomes of the loss of a micro-batch."""

    divisor: float | torch.Tensor | None  # None: it is divided as those of all micro-batches are
    lacks_items: bool | torch.Tensor  # whether it has no label; of labels on a device a tensor, which is not read
    is_of_mean: bool


class MicroBatchWeights:
    """Weighs the micro-batches of updates.

    `sum_over_processes`: where processes weigh their items together, a scalar tensor -> its sum over all of them.
    `batches_are_even`: whether all processes read batches of as many samples, so that samples need not be summed.
    """

    def __init__(
        self,
        label_names: Sequence[str],
        labels_are_shifted: bool,
        *,
        device: torch.device,
        num_processes: int = 1,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
        batches_are_even: bool = True,
    ) -> None:
        self._label_names, self._labels_are_shifted = tuple(label_names), labels_are_shifted
        self._device, self._num_processes, self._sum = device, num_processes, sum_over_processes
        self._batches_are_even = batches_are_even or num_processes == 1
        self.row_name: str | None = None  # of labels that are numbers, whose samples are the items

    def are_needed(self, batch: Any, num_batches: int) -> bool:
        """Whether micro-batches like `batch`, the first of a run, may weigh something else than others."""
        if targets_of(batch, None, self._label_names, self._labels_are_shifted) is not None:
            return True
        names = self._label_names if hasattr(batch, "keys") else ()
        found = [name for name in names if name in batch and isinstance(batch[name], torch.Tensor)]
        if self._batches_are_even:
            self._sum = None
            self.row_name = found[0] if len(found) == 1 and batch[found[0]].ndim else None
        return num_batches > 1 or not self._batches_are_even

    def of_update(self, batches: Sequence[Any], kind: LossKind, num_items: Any) -> list[Weight | None] | None:
        """The weight of each micro-batch, or None for one that is like any other; None for all such; empty where no
        micro-batch of any process has an item, so that there is nothing to learn.

        `num_items`: what the losses were divided by, if they are shares. Every process must call this.
        """
        items = [items_in(batch, self._label_names, self._labels_are_shifted) for batch in batches]
        total: Any = sum(items)
        together = kind == "mean" and self._sum is not None
        of_all: Any = total
        if together and self._sum is not None:
            of_all = self._sum(torch.as_tensor(total, device=self._device))
        is_known = not isinstance(total, torch.Tensor)
        if is_known and total == 0 and kind != "override" and self._nobody_has_any(of_all if together else num_items):
            return []
        if is_known and not together and (kind != "mean" or items.count(items[0]) == len(items)) and 0 not in items:
            return None
        return [self._weight(count, of_all, kind, together) for count in items]

    def _nobody_has_any(self, of_all: Any) -> bool:
        """Read from the device, but only in a process without any item: where one has some, it does not come here."""
        if self._num_processes == 1:
            return True
        return self._sum is not None and of_all is not None and not float(of_all)

    def _weight(self, count: Any, of_all: Any, kind: LossKind, together: bool) -> Weight | None:
        is_of_mean = kind == "mean"
        if isinstance(count, torch.Tensor):
            # A loss over nothing is NaN; one label is lent to it, and it is divided by infinity.
            share = count if is_of_mean else (count > 0).int()
            whole = torch.clamp(torch.as_tensor(of_all), min=1) if is_of_mean else 1
            processes = self._num_processes if together else 1
            divisor = None if kind == "override" else whole / (share * processes)
            return Weight(divisor, count == 0, is_of_mean)
        if count == 0:
            return Weight(None if kind == "override" else math.inf, True, is_of_mean)
        if not is_of_mean:
            return None
        return Weight(of_all / (count * self._num_processes if together else count), False, True)


def items_in(batch: Any, label_names: Sequence[str], labels_are_shifted: bool) -> int | torch.Tensor:
    """What the mean loss of a micro-batch is a mean over: labels that are not -100, or samples where its labels are no
    classes. 1 where neither can be told. Counted by NumPy for labels on the host, which waits for no device.
    """
    targets = targets_of(batch, None, label_names, labels_are_shifted)
    if targets is None:
        return find_batch_size(batch) or 1
    if targets.is_cpu:
        return int(np.count_nonzero(targets.numpy() != IGNORE_INDEX))
    return (targets != IGNORE_INDEX).sum()


def with_one_item(inputs: Any, label_names: Sequence[str], lacks_items: bool | torch.Tensor) -> Any:
    """`inputs` whose last label of each row is class 0 where `lacks_items`, so that the mean over them is a number.

    Its gradients are multiplied by 0. Leaving out a backward pass instead would have other processes wait for it.
    """
    present = [name for name in label_names if name in inputs]
    name = SHIFTED_LABELS if SHIFTED_LABELS in inputs else present[0]
    labels = inputs[name].clone()
    last = labels[..., -1:]
    last.copy_(torch.where(torch.as_tensor(lacks_items, device=last.device), torch.zeros_like(last), last))
    inputs = copy.copy(inputs)
    inputs[name] = labels
    return inputs
