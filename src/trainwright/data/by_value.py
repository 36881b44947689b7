"""Small tensors on their way from a loader worker, sent as their bytes.

Owns: what a tensor becomes in the message that holds its batch. Leaves to others: receiving messages
(`worker_transport`), large tensors, for which torch sends a file descriptor of shared memory.

Why: the receiver asks for each of those descriptors over a socket of its own, with a handshake in Python, and the
worker has to wake up for it. For the tensors of most batches of text that costs far more than copying them.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor

MOST_BYTES = 2**16  # of one tensor; beyond four times that, copying takes longer than the descriptor
# Not those of which torch makes only some kinds of tensors, such as quantized ones.
DTYPES = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}) | frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)


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
