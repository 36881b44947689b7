"""Where in its data a run stands while it runs, counted in micro-batches of an epoch and in samples.

Owns: the epoch, what was taken of it, the generators it began with, and iterating from there. Leaves to others: going
to a place (`position`), workers that are lost (`restart`), what a checkpoint holds of it (`resume`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainwright.data import position
from trainwright.data.receiving import iterate_ahead
from trainwright.data.restart import RestartingIterator


class DataProgress:
    """`samples_per_micro_batch` counts all processes; `len_dataloader` is in micro-batches, None where unknown."""

    def __init__(
        self,
        samples_per_micro_batch: int = 1,
        len_dataloader: int | None = None,
        *,
        epoch: int = 0,
        samples_ahead: int = 0,
        generators: dict[str, Any] | None = None,
        saved_shares: Any = None,
    ) -> None:
        self.epoch, self.micro_batches = epoch, 0  # of this epoch
        self.size = samples_per_micro_batch
        # As `seeding.generator_states` gives them, from the start of this epoch: the order of its samples.
        self.generators = generators
        self._samples_ahead = samples_ahead  # beyond the micro-batches, after a resume with another batch size
        self._length, self._saved_shares = len_dataloader, saved_shares
        self._shares: position.WorkerShares | None = None  # of a stream, before the micro-batches of this epoch

    def begin_epoch(self, epoch: int, micro_batches: int) -> None:
        """Stand in `epoch`, behind so many micro-batches that an earlier run took of it."""
        if epoch != self.epoch:
            self._samples_ahead = 0
        self.epoch, self.micro_batches = epoch, micro_batches

    @property
    def samples(self) -> int:
        """How many samples of this epoch were taken, over all processes."""
        return self.micro_batches * self.size + self._samples_ahead

    def next_sample(self) -> tuple[int, int, dict[str, Any] | None]:
        """(epoch, samples of it that were taken, shares of the workers); a finished pass is the start of the next."""
        if self._length is not None and self.micro_batches >= self._length:
            return self.epoch + 1, 0, None
        shares = self._shares.after(self.micro_batches).to_dict() if self._shares is not None else None
        return self.epoch, self.samples, shares

    def iterate(self, dataloader: Any, num_processes: int) -> Iterator[Any]:
        """An iterator over this epoch from where the run stands, without fetching what it skips where it can; with
        workers, one that replaces those that are lost.
        """
        first_micro_batch, first_sample, size, epoch = self.micro_batches, self.samples, self.size, self.epoch
        shares = position.WorkerShares.going_on(
            self._saved_shares, dataloader, num_processes, is_start=first_sample == 0
        )
        self._shares = None if shares is None else shares.after(-first_micro_batch)

        def begin(num_given: int = 0, alone: bool = False) -> Iterator[Any]:
            source = position.with_one_worker(dataloader) if alone else dataloader
            now = None if shares is None else shares.after(num_given)
            loader, num_left = position.seek(source, first_sample + num_given * size, size, now)
            iterator = iterate_ahead(loader)
            position.discard_batches(iterator, num_left)
            return iterator

        def describe(num_given: int) -> str:
            return position.describe(dataloader, first_sample + num_given * size, size, epoch)

        if not getattr(dataloader, "num_workers", 0):
            return begin()
        return RestartingIterator(begin, describe, self.generators)
