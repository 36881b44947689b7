"""The operations that differ between one process and many.

Owns: `Strategy`, whose defaults are those of one process on one device: torch's objects, unwrapped. Leaves to
others: several processes (`distributed`), the training loop that calls them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainwright import gradients
from trainwright.data.loaders import with_answers
from trainwright.interop.models import unwrapped


class Strategy:
    """One process, one device. The training loop calls these; a backend with several processes overrides some."""

    num_processes = 1
    num_batches_at_once = 1  # loader batches that all ranks consume together: one each, or one that is split
    num_processes_here = 1  # on this machine
    process_index = 0
    is_main = True  # the first of all
    tp_size = 1  # processes that have one copy of the model between them (tensor parallel), and count as one
    is_first_of_group = True  # of those
    is_distributed = False
    should_save = True  # whether this process writes files
    shards_weights = False  # each process holds a part of the weights, the gradients and the optimizer's state
    writes_parts = False  # each process writes its part of the weights and the optimizer's state into a checkpoint
    checkpointing: dict[str, Any] | None = None  # of activations: its settings, where the engine asks for it
    places_model = False  # the engine moves the model to the device when training begins
    autocasts = True  # the forward pass runs under autocast where the arguments ask for half precision
    measures_norm = False  # the norm of the gradients is taken whether they are clipped or not
    optimizer_cls_and_kwargs: tuple[Callable[..., Optimizer], dict[str, Any]] | None = None  # in place of `args.optim`
    averages_gradients = False  # in a call after the backward passes of an update
    repeats_alone = True  # whether a process may do its share of an update again without the others taking part

    def __init__(self, device: torch.device, *, fp16: bool = False) -> None:
        self.device = device
        self.scaler: torch.amp.GradScaler | None = torch.amp.GradScaler(device.type) if fp16 else None

    # -- preparing -----------------------------------------------------------------------------------------------------

    def shard_weights(self, model: nn.Module, optimizer: Any = None) -> None:
        """Divide the weights over processes, in place, before an optimizer is built on them; `optimizer`: one that was
        given, which then holds the parts. A second call changes nothing.
        """

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Wrap the model for training, where the backend needs a wrapper."""
        return model

    def prepare(
        self, model: Any, optimizer: Any, scheduler: Any, *, num_training_steps: int, micro_batch: int
    ) -> tuple[Any, Any, Any]:
        """(model, optimizer, schedule) as the loop uses them, where an engine wraps them together.

        num_training_steps: updates of the run. micro_batch: samples, of one process.
        """
        return model, optimizer, scheduler

    def release_model(self) -> None:
        """Hold no model and no optimizer of before: the next one is about to be built."""

    def has_divided(self, optimizer: Any) -> bool:
        """Whether `optimizer` holds parts of weights that an earlier `prepare` made, not the model's parameters."""
        return False

    def prepare_dataloader(self, dataloader: Any, *, is_training: bool = True) -> Any:
        """Shard the batches by rank."""
        return with_answers(dataloader)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model the user passed, without wrappers."""
        return unwrapped(model)  # type: ignore[no-any-return]

    # -- a step --------------------------------------------------------------------------------------------------------

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Those of `model` that the optimizer steps, also where a forward pass has put others in their place."""
        return list(model.parameters())

    def forward_only(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Context of forward passes of `model` that no backward pass follows: evaluation, generation."""
        return contextlib.nullcontext()

    def begin_update(self, model: nn.Module) -> None:
        """Before the first micro-batch of an update that may have to be repeated (`auto_find_batch_size`)."""

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """After its last one: average the gradients over ranks, where the backward pass did not."""

    def without_grad_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Context of each micro-batch but the last of an update: ranks exchange gradients only in the last."""
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        if self.scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, optimizer: Optimizer) -> torch.Tensor:
        """Scale gradients down to `max_norm`; return the norm they had, as a tensor on their device."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return gradients.clip_grad_norm(parameters, max_norm)

    def norms_of_gradients(self, found: list[torch.Tensor]) -> list[torch.Tensor]:
        """Norms whose norm is the norm of the gradients `found`, over all processes: see `gradients.norms_of`."""
        return gradients.norms_of(found)

    def optimizer_step(self, optimizer: Optimizer) -> bool:
        """Update the weights. False when fp16 gradients overflowed and the update was skipped."""
        if self.scaler is None:
            optimizer.step()
            return True
        one = torch.ones((), device=self.device)
        before = self.scaler.scale(one)  # on the device, so that both scales cost one read and not two
        self.scaler.step(optimizer)
        self.scaler.update()
        return not bool(self.scaler.scale(one) < before)

    def discard_update(self) -> None:
        """An update is not made: drop what its micro-batches left in the engine."""

    @property
    def scales_loss(self) -> bool:
        """Whether losses are scaled (fp16), so that an update may overflow and be skipped without being bad."""
        return self.scaler is not None

    # -- collectives ---------------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> Any:
        """The tensors of all ranks, concatenated along their first dimension."""
        return value

    def gather_for_metrics(self, value: Any) -> Any:
        """Like `gather`, without the samples that were repeated to fill the last batch."""
        return value

    def num_own_rows(self, num_rows: int, dataloader: Any) -> int:
        """How many rows of the last batch of `dataloader`, from its start, are no padding duplicates."""
        return num_rows

    def without_repeats(self, value: Any, dataloader: Any) -> Any:
        """Only the rows of `num_own_rows`."""
        return value

    def pad_across_processes(self, value: Any, dim: int = 1, pad_index: int = -100) -> Any:
        """Pad dimension `dim` to the longest of all ranks, so that `gather` can concatenate."""
        return value

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def mean_of_floats(self, values: list[float]) -> list[float]:
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """One small value of each rank, in rank order."""
        return [value]

    def barrier(self) -> None:
        """Wait for the other ranks."""

    # -- saving and loading --------------------------------------------------------------------------------------------

    def whole_weights(self, model: nn.Module) -> dict[str, Any] | None:
        """The state dict of `model` where its weights are in parts, whole, in a process that writes; all processes call
        it together. None: the model has it.
        """
        return None

    def whole_copy(self, model: nn.Module) -> nn.Module | None:
        """`model` as one that can be copied and changed: where its weights are in parts, a copy with whole ones, in a
        process that writes (others: None); all processes call it together. Raises ValueError where there is none.
        """
        if self.shards_weights:
            raise ValueError("save_merged_model cannot copy a model that is divided: save the adapter, merge it after.")
        return self.unwrap(model)

    def gathered(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Context in which each process has whole weights, to load others into them."""
        return contextlib.nullcontext()

    def save_state(self, directory: str, step: int) -> bool:
        """Write weights and optimizer state into a checkpoint in the engine's form; all processes call it together.
        False: it has none, and the optimizer's state is to be written.
        """
        return False

    def restores_weights(self, checkpoint: str) -> bool:
        """Whether `load_state` will put the weights of `checkpoint` into the model, too."""
        return False

    def load_state(self, checkpoint: str) -> bool:
        """Restore what `save_state` wrote; False where that wrote nothing. Raises ValueError for another's form."""
        return False

    def staged(
        self, stage: Callable[[], contextlib.AbstractContextManager[str]]
    ) -> contextlib.AbstractContextManager[str]:
        """The directory of `stage()`, for every process to write into; `stage()` ends when the last one has."""
        return stage()

    def first_error(self, error: Exception | None) -> Exception | None:
        """The error of this rank, else that of another; None where none failed. Waits for all. One that `concerns_all`
        is of the same class in each.
        """
        return error
