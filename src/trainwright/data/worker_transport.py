"""Batches of loader workers on their way to the loop: sent by value where they are small, received while it computes.

Owns: what a tensor becomes in the message that holds its batch, the thread that receives messages, and the switch for
both (`TRAINWRIGHT_WORKER_TRANSPORT=torch`). Leaves to others: asking workers for batches, their order, errors and
losses, which torch's own iterator does in the thread of the loop; large tensors, for which torch sends a file
descriptor of shared memory.

Why: a worker passes a batch on as a message, and each tensor in it as a file descriptor that the receiver has to ask
for over a socket, with a handshake in Python, from a process that sleeps. That takes a millisecond or more, for which
the loop would wait; the tensors of most batches of text are copied in far less. Where batches are pinned a thread of
torch's receives them meanwhile, on a CPU none does. Only the receiving moves: the sampler is asked, and batches are
counted, at the moment they would be anyway, so that no random number is drawn at another one.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader

SWITCH = "TRAINWRIGHT_WORKER_TRANSPORT"  # an environment variable; "torch": nothing of this module is used

MOST_BYTES = 2**16  # of one tensor; beyond four times that, copying takes longer than the descriptor
# Not those of which torch makes only some kinds of tensors, such as quantized ones.
DTYPES = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}) | frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
MOST_AHEAD = 8  # batches; each of their tensors may hold a file descriptor open, and many systems allow only 1024
CHECK_S = 5.0  # a worker killed while it writes takes a lock with it, and then nothing can wake the thread
# After that a thread is given up: it reads a message of which the worker that was killed wrote only a part.
MOST_WAIT_S = 2 * CHECK_S
# What is used of torch's iterator that it does not document; an iterator without one of them is left as it is.
USED = ("_worker_result_queue", "_data_queue", "_next_data", "_num_yielded", "_IterableDataset_len_called")


def is_on() -> bool:
    """Whether batches of workers take this way; read when a loader is built and when an iteration begins.

    Raises ValueError for a value of the switch that is neither empty nor "torch".
    """
    value = os.environ.get(SWITCH, "")
    if value not in ("", "torch"):
        raise ValueError(
            f"{SWITCH}={value!r} means nothing. Set it to 'torch' for torch's own transport, or leave it out."
        )
    return not value


# ------------------------------------------------------------------------------------------------ sending by value ----


def by_value(worker_init_fn: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """A `worker_init_fn` that does what the given one does in a worker that sends small tensors by value."""
    return functools.partial(start_sending_by_value, then=worker_init_fn) if is_on() else worker_init_fn


def start_sending_by_value(worker_id: int, then: Callable[[int], None] | None) -> None:
    """A `worker_init_fn`: send small tensors by value, and do what `then` does."""
    ForkingPickler.register(torch.Tensor, _reduced)
    if then is not None:
        then(worker_id)


def _reduced(tensor: torch.Tensor) -> Any:
    """As pickle wants it: a function, and the arguments with which it makes the tensor again. It must not fail: torch
    would drop the message, and the loop would wait for it forever."""
    is_plain = (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in DTYPES
        and not (tensor.is_nested or tensor.requires_grad or tensor.is_neg())
        and tensor.is_contiguous()
        and 0 < tensor.nbytes <= MOST_BYTES
    )
    if not is_plain:
        return reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    return _made_again, (_bytes_of(tensor).tobytes(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _made_again(values: bytes, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.empty_strided(shape, stride, dtype=dtype)  # memory of torch's own: aligned as it is without workers
    _bytes_of(tensor)[:] = np.frombuffer(values, dtype=np.uint8)
    return tensor


def _bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The memory of a contiguous tensor, whatever strides it has where there is one place only."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


# ------------------------------------------------------------------------------------------------ receiving ahead ----


class Receiver(threading.Thread):
    """Takes from the queue of a loader's workers, at most `MOST_AHEAD` items before they are asked for.

    It takes the place of that queue in torch's iterator (`get`), and of the thread that pins memory (`join`), so that
    torch ends it together with the workers, by setting `done`.
    """

    def __init__(self, source: Any) -> None:
        super().__init__(name="trainwright-batches", daemon=True)
        self.done = threading.Event()
        self._source = source
        self._received: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(MOST_AHEAD)

    def get(self, timeout: float) -> Any:
        """The next item, or the error that came in its place; raises queue.Empty after `timeout` seconds."""
        item, error = self._received.get(timeout=timeout)
        self._room.release()
        if error is None:
            return item
        try:
            raise error
        finally:
            del error  # it holds this frame, and this frame would hold it: workers would outlive their loader

    def run(self) -> None:
        while not self.done.is_set():
            self._room.acquire()
            try:
                self._received.put((self._source.get(timeout=CHECK_S), None))
            except queue.Empty:
                self._room.release()
            except Exception as error:  # a worker that is gone, no more file descriptors: for the loop to deal with
                self._received.put((None, error))

    def join(self, timeout: float | None = None) -> None:
        self._room.release()  # it may be waiting for room
        if threading.current_thread() is not self:  # which is where the garbage collector may have found the loader
            super().join(MOST_WAIT_S if timeout is None else timeout)


class ReceivedBatches:
    """The batches of one of torch's iterators, without the record that it makes of each for a profiler while none runs:
    after a step of 40 ms that record takes 0.3 ms of the 0.5 ms which are left when batches are received ahead."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator
        self._warns = iterator._IterableDataset_len_called is not None  # of a stream that is longer than it said

    def __getattr__(self, name: str) -> Any:
        if name == "_iterator":  # not there yet while this object is copied
            raise AttributeError(name)
        return getattr(self._iterator, name)

    def __iter__(self) -> ReceivedBatches:
        return self

    def __next__(self) -> Any:
        iterator = self._iterator
        if self._warns or torch._C._autograd._profiler_enabled():
            return next(iterator)
        batch = iterator._next_data()
        iterator._num_yielded += 1
        return batch


class ReceivingLoader(DataLoader[Any]):
    """A loader whose iterators receive ahead although other code asks for them."""

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        _receive_ahead(iterator)
        return iterator


def iterate_ahead(dataloader: Any) -> Iterator[Any]:
    """`iter(dataloader)`, receiving ahead where torch's own iterator takes batches from workers, also inside
    accelerate's loaders, and no thread of torch's does it already. Other loaders and iterators are left as they are.
    """
    if not is_on():
        return iter(dataloader)
    inner = getattr(dataloader, "base_dataloader", None)
    if type(inner) is DataLoader:
        inner.__class__ = ReceivingLoader  # accelerate makes torch's iterator out of reach, at its first batch
    iterator: Iterator[Any] = iter(dataloader)
    return ReceivedBatches(iterator) if _receive_ahead(iterator) else iterator


def _receive_ahead(iterator: Any) -> bool:
    """Whether workers make the batches of `iterator` and it is one of torch's; such a one receives ahead from now on.

    Another library's iterator (torchdata's) may look the same and keep more count of its batches.
    """
    if type(iterator).__module__ != DataLoader.__module__ or not all(hasattr(iterator, name) for name in USED):
        return False
    if iterator._data_queue is iterator._worker_result_queue:  # else pinned, or persistent workers with a receiver
        receiver = Receiver(iterator._worker_result_queue)
        iterator._data_queue = iterator._pin_memory_thread = receiver
        iterator._pin_memory_thread_done_event = receiver.done
        receiver.start()
    return True
