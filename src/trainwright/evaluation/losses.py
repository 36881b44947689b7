"""The evaluation loss: one loss per batch, what it weighs, and their mean.

Owns: counting what a batch's loss is a mean of, and averaging without a read from the device before the end. Leaves to
others: computing the losses, and gathering them from other processes (`loop`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trainwright.names import IGNORE_INDEX
from trainwright.nested import numpify

Array = np.ndarray[Any, Any]
BATCHES_AT_ONCE = 1024  # scalars that become one tensor: each by itself takes 512 bytes of an accelerator


class EvalLosses:
    """The losses of an evaluation, on their device until the end: one per batch, or per sample if gathered."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []  # scalars, one per batch, of the batches not joined yet
        self._items: list[torch.Tensor | None] = []  # scalars
        self._num_rows: list[int] = []
        self._joined: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = []  # losses (n,), items (n,), rows of each

    def add_batch(self, loss: torch.Tensor, targets: torch.Tensor | None, num_rows: int) -> None:
        """The mean loss of a batch of `num_rows` samples, over the items in `targets` (None: each sample is one)."""
        if loss.ndim or loss.requires_grad:
            loss = loss.detach().mean()  # a loss per device becomes one
        self._losses.append(loss)
        self._items.append(None if targets is None else num_items(targets))
        self._num_rows.append(num_rows)
        if len(self._losses) == BATCHES_AT_ONCE:
            self._join()

    def add_batches(self, losses: torch.Tensor, items: torch.Tensor | None, num_rows: int) -> None:
        """The mean losses (batches,) and items (None: each sample is one) of batches of `num_rows` samples each."""
        self._join()
        all_rows = [num_rows] * len(losses)
        self._joined.append((losses.float(), torch.tensor(all_rows) if items is None else items, all_rows))

    def add_samples(self, losses: torch.Tensor, items: torch.Tensor) -> None:
        """Losses and items of single samples, both (n,)."""
        self._joined.append((losses, items, [1] * len(losses)))

    def arrays(self) -> tuple[Array | None, Array | None]:
        """Losses (float32) and items (float64), both (num_samples,); None without any. Waits for the device.

        The samples of a batch have its mean loss, and share its items evenly.
        """
        self._join()
        if not self._joined:
            return None, None
        losses = numpify(torch.cat([losses for losses, _, _ in self._joined]))
        device = self._joined[-1][1].device  # items that are one for each sample were counted on the host
        items = numpify(torch.cat([items.to(device) for _, items, _ in self._joined])).astype(np.float64)
        num_rows = np.concatenate([rows for _, _, rows in self._joined])
        return np.repeat(losses, num_rows), np.repeat(items / num_rows, num_rows)

    def _join(self) -> None:
        if not self._losses:
            return
        if self._items.count(None) == len(self._items):
            items = torch.tensor(self._num_rows)
        else:  # where some batches have no items, each of their samples is one
            device = next(items.device for items in self._items if items is not None)
            counts = zip(self._items, self._num_rows)
            items = torch.stack([torch.tensor(n, device=device) if i is None else i for i, n in counts])
        self._joined.append((torch.stack(self._losses).float(), items, self._num_rows))
        self._losses, self._items, self._num_rows = [], [], []


def num_items(targets: torch.Tensor, each_row: bool = False) -> torch.Tensor:
    """How many of `targets` are no -100; `each_row`: of each row of them."""
    taking_part = targets != IGNORE_INDEX
    return taking_part.sum(dim=1) if each_row else taking_part.sum()


def per_sample(loss: torch.Tensor, targets: torch.Tensor | None, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch's mean loss and the items it is a mean of, once per sample: two tensors (num_rows,), float32."""
    losses = loss.detach().mean().float().repeat(num_rows)
    if targets is None:
        return losses, torch.ones(num_rows)
    items: torch.Tensor = (targets != IGNORE_INDEX).reshape(targets.shape[0], -1).sum(dim=1).float()
    if len(items) != num_rows:  # inputs packed into other rows than the labels: spread evenly, the sum is what counts
        items = (items.sum() / num_rows).repeat(num_rows)
    return losses, items


def weighted_mean(losses: Array, items: Array) -> float:
    """The mean of `losses` (num_samples,) weighted by `items` (num_samples,), in float64.

    A sample without items takes no part: its batch may have had no target at all, whose mean loss is NaN. Where no
    sample has any, the plain mean.
    """
    taking_part = items > 0
    if not taking_part.any():
        return float(losses.mean(dtype=np.float64))
    return float(np.average(losses[taking_part].astype(np.float64), weights=items[taking_part].astype(np.float64)))
