"""How much memory one micro-batch takes between the forward and the end of the backward pass.

Owns: counting it. Leaves to others: making the batch, computing the loss (the Trainer's hook).

A copy of the model runs on tensors that have a device, a type and a shape, and no memory (torch's fake tensors): it
costs next to no time, whatever the size of the model. A model whose Python code asks for values, which such tensors
lack, is copied and run for real where that is cheap.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trainwright import nested

MOST_BYTES = 2**30  # of a model that is copied to run for real
MOST_FLOPS = 2e11  # of such a run: seconds on a few cores

Loss = Callable[[nn.Module, Any], torch.Tensor]


def activation_bytes(
    model: nn.Module, batch: Any, loss_of: Loss, prepared: Callable[[nn.Module], Callable[[], None]]
) -> tuple[int | None, str]:
    """(bytes, how they were found), or (None, why not): the most that is alive at once in a forward and a backward pass
    over `batch` (on the device) besides weights, gradients and the batch.

    prepared: changes a model as training would (checkpointed activations), and returns what undoes it.
    """
    try:
        return _measured(model, batch, loss_of, prepared, is_fake=True), "on tensors without memory"
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    num_items = max((value.numel() for value in _tensors(batch)), default=0)
    flops = 6 * sum(parameter.numel() for parameter in model.parameters()) * num_items
    if num_bytes > MOST_BYTES or flops > MOST_FLOPS:
        return None, f"the model needs values to run, and a real pass would not be cheap ({reason})"
    try:
        return _measured(model, batch, loss_of, prepared, is_fake=False), "on a copy of the model"
    except Exception as error:
        return None, f"a forward and backward pass ended in {type(error).__name__}: {error}"


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory that is allocated within it and not freed yet. `peak`: the most, without gradients that are
    complete.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = self._gradients = 0
        self._known: dict[int, Any] = {}  # by the address of a storage in C++, which is free for another after it

    def ignore(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage

    def add_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._gradients += parameter.grad.untyped_storage().nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, result)
        return result

    def _add(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            key, num_bytes = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known[key] = weakref.finalize(storage, self._free, key, num_bytes)
                self._live += num_bytes
                self.peak = max(self.peak, self._live - self._gradients)
        return tensor

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.pop(key, None)
        self._live -= num_bytes


def _measured(
    model: nn.Module, batch: Any, loss_of: Loss, prepared: Callable[[nn.Module], Callable[[], None]], *, is_fake: bool
) -> int:
    fake = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else None
    live = LiveBytes()
    with contextlib.ExitStack() as undo:
        copied = _copy(model, fake)
        copied.train()
        inputs = batch if fake is None else nested.map(functools.partial(_converted, fake), batch)
        for tensor in (*copied.parameters(), *copied.buffers(), *_tensors(inputs)):
            live.ignore(tensor)
        undo.callback(prepared(copied))
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(live.add_gradient)  # type: ignore[no-untyped-call]
        with fake if fake is not None else contextlib.nullcontext(), live:
            loss_of(copied, inputs).mean().backward()  # type: ignore[no-untyped-call]
    return live.peak


def _converted(fake: FakeTensorMode, leaf: Any) -> Any:
    return fake.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _copy(model: nn.Module, fake: FakeTensorMode | None) -> nn.Module:
    """A copy; with `fake` one whose weights have no memory, so that none is needed for it."""
    known: dict[int, Any] = {}
    if fake is not None:
        for parameter in model.parameters():
            converted = nn.Parameter(fake.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad)
            known[id(parameter)] = converted
        known.update({id(buffer): fake.from_tensor(buffer) for buffer in model.buffers()})
    return copy.deepcopy(model, known)


def _tensors(batch: Any) -> list[torch.Tensor]:
    leaves: list[Any] = []
    nested.map(leaves.append, batch)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
