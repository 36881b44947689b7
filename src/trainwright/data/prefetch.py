"""Batches on their way to a CUDA device while it computes.

Owns: `DevicePrefetcher`. Leaves to others: fetching and pinning batches (loaders), moving those of other devices
(`Trainer._prepare_input`). On CPU nothing of this is used.

Why a second stream: a copy on the stream that computes waits for all that was launched there before. The loop reads
nothing from the device between two log lines, so it is ahead of it by a good part of a step; a copy on a second stream
has that long to arrive. Why only within an update: the batches of the next one are made ahead by the loader's workers.
Without workers making them early would draw random numbers in another order, and no resume would be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from trainwright.nested import items, map_items


class DevicePrefetcher:
    """Gives the batches of an update on `device`, each copied while the one before it is worked on.

    `stream`, `current_stream`, `use` are those of `torch.cuda` (`Stream`, `current_stream`, `stream`) unless given.
    Batches should lie in pinned memory (`dataloader_pin_memory`); others arrive too, but the copy holds up the host.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        stream: Any = None,
        current_stream: Callable[[], Any] | None = None,
        use: Callable[[Any], Any] = torch.cuda.stream,
    ) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if stream is None else stream  # type: ignore[no-untyped-call]
        self._current_stream = current_stream or (lambda: torch.cuda.current_stream(device))
        self._use = use

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches on the device, in the same order."""
        waiting = iter(batches)
        following = self._begin(next(waiting, None))
        while following is not None:
            batch, current = following, self._current_stream()
            current.wait_stream(self._stream)  # for the copies begun so far: this batch, not the one after it
            _record(batch, current)
            following = self._begin(next(waiting, None))
            yield batch

    def _begin(self, batch: Any) -> Any:
        """Start the copy of a batch; what is returned may be read on the stream only that waits for it."""
        if batch is None:
            return None
        with self._use(self._stream):
            return _moved(batch, self.device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return map_items(lambda item: _moved(item, device), value)


def _record(value: Any, stream: Any) -> None:
    """Tell the allocator that `stream` uses these tensors, or it would hand out their memory while they are read."""
    if isinstance(value, torch.Tensor):
        value.record_stream(stream)
    for item in items(value):
        _record(item, stream)
