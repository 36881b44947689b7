"""The position of a run in its data, counted in micro-batches of an epoch and in samples.

Owns: the epoch, what was read of it, the generators' states at its start, and iterating from there. Leaves to others:
going to a position (`seek`), workers that are lost (`worker_recovery`), what a checkpoint holds of it (`run/resume`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainwright.data import seek
from trainwright.data.worker_recovery import RecoveringIterator
from trainwright.data.worker_transport import iterate_ahead


class DataPosition:
    """The next sample to read, while a run reads them.

    `samples_per_micro_batch` counts all processes; `len_dataloader` is in micro-batches, None where unknown.
    """

    def __init__(
        self,
        samples_per_micro_batch: int = 1,
        len_dataloader: int | None = None,
        *,
        epoch: int = 0,
        samples_ahead: int = 0,
        generators: dict[str, Any] | None = None,
        saved_shares: Any = None,
        samples_of_pass: int | None = None,
    ) -> None:
        self.epoch, self.micro_batches = epoch, 0  # of this epoch
        self.size = samples_per_micro_batch
        # As `RngState.to_json` gives them, from the start of this epoch: the order of its samples.
        self.generators = generators
        self._samples_ahead = samples_ahead  # beyond the micro-batches, after a resume with another batch size
        self._length, self._saved_shares = len_dataloader, saved_shares
        self._shares: seek.WorkerShares | None = None  # of a stream, before the micro-batches of this epoch
        # Of the last pass that ended before the length that was announced, or that had none; None before there is one.
        self.short_pass = None if samples_of_pass is None else -(-samples_of_pass // samples_per_micro_batch)
        self.has_ended = False  # callbacks heard the end of this epoch
        self.owes_end = False  # callbacks have still to hear the end of the epoch before, or of this one at its end
        self.last_update: tuple[float | None, Any] = (
            None,
            None,
        )  # (learning rate, gradient norm), as a log line has them

    def begin_epoch(self, epoch: int, micro_batches: int) -> None:
        """Move to `epoch`, behind so many micro-batches that an earlier run read of it."""
        if epoch != self.epoch:
            self._samples_ahead = 0
        self.epoch, self.micro_batches, self.has_ended = epoch, micro_batches, False

    def data_ended(self) -> float:
        """The data gave no more batch, before as many as were expected. Returns how many passes are done."""
        if self.micro_batches == 0:
            return self.epoch
        self.short_pass = self.micro_batches
        return self.epoch + 1.0

    @property
    def samples_of_pass(self) -> int | None:
        """Samples of the last pass that ended early; None before there is one."""
        return None if self.short_pass is None else self.short_pass * self.size

    @property
    def samples(self) -> int:
        """How many samples of this epoch were read, over all processes."""
        return self.micro_batches * self.size + self._samples_ahead

    def is_over(self, is_cut_short: bool = False) -> bool:
        """Whether nothing of this epoch is left, or a callback ends it here (`is_cut_short`)."""
        return is_cut_short or (self._length is not None and self.micro_batches >= self._length)

    def next_sample(self, is_cut_short: bool = False) -> tuple[int, int, dict[str, Any] | None]:
        """(epoch, samples of it that were read, shares of the workers); a finished pass is the start of the next."""
        if self.is_over(is_cut_short):
            return self.epoch + 1, 0, None
        shares = self._shares.after(self.micro_batches).to_dict() if self._shares is not None else None
        return self.epoch, self.samples, shares

    def iterate(self, dataloader: Any, num_processes: int) -> Iterator[Any]:
        """An iterator over this epoch from this position, without fetching what it skips where it can; with workers,
        one that replaces those that are lost.
        """
        first_micro_batch, first_sample, size, epoch = self.micro_batches, self.samples, self.size, self.epoch
        shares = seek.WorkerShares.restored(self._saved_shares, dataloader, num_processes, is_start=first_sample == 0)
        self._shares = None if shares is None else shares.after(-first_micro_batch)
        if epoch > 0:
            seek.draw_no_seed_for_workers_that_stay(dataloader, epoch)

        def begin(num_given: int = 0, one_worker: bool = False) -> Iterator[Any]:
            source = seek.with_one_worker(dataloader) if one_worker else dataloader
            now = None if shares is None else shares.after(num_given)
            loader, num_left = seek.seek(source, first_sample + num_given * size, size, now)
            iterator = iterate_ahead(loader)
            seek.discard_batches(iterator, num_left)
            return iterator

        def describe(num_given: int) -> str:
            return seek.describe(dataloader, first_sample + num_given * size, size, epoch)

        if not getattr(dataloader, "num_workers", 0):
            return begin()
        return RecoveringIterator(begin, describe, self.generators)
