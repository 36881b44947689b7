"""What accelerate's loaders answer, answered by torch's.

Owns: `RunLoader`, torch's loader with four more answers. Leaves to others: building a loader (`loaders.py`), and the
loaders that accelerate prepares, which answer by themselves.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from trainwright.data import loaders
from trainwright.data.rebalance import BatchRebalanceSampler


class RunLoader(DataLoader[Any]):
    """A loader that no Accelerator prepared, which answers what a script asks of one that was."""

    @property
    def total_batch_size(self) -> int:
        """Samples that all processes take at once."""
        if isinstance(self.batch_sampler, BatchRebalanceSampler):  # the mean: its micro-batches differ in size
            return self.batch_sampler.effective_batch_size // self.batch_sampler.grad_accum
        return int(self.batch_size or getattr(self.batch_sampler, "batch_size", None) or 1)

    @property
    def total_dataset_length(self) -> int:
        """Samples of all processes. TypeError where the data set has no length."""
        return len(self.dataset)  # type: ignore[arg-type]

    @property
    def base_dataloader(self) -> DataLoader[Any]:
        """torch's loader: this one."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`."""
        loaders.set_epoch(self, epoch)


def with_answers(dataloader: Any) -> Any:
    """`dataloader`, as a `RunLoader` where it is torch's own. The object stays the same."""
    if type(dataloader) is DataLoader:
        dataloader.__class__ = RunLoader
    return dataloader
