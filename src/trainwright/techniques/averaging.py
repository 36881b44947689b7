"""An exponential moving average (EMA) of the weights.

Owns: the average, its file in a checkpoint, and swapping it into the model. Leaves to others: when it is
updated, evaluated and saved (Trainer). Source: Polyak and Juditsky 1992; Tarvainen and Valpola 2017 (the decay).

After each `every` steps from `start_step` on: average = decay * average + (1 - decay) * weights. Memory: one copy of
the trainable weights, in float32 where they are narrower (at decay 0.999 a step in bfloat16 would be lost in rounding).
Time: one kernel over all weights per update.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from trainwright.checkpoint import sink
from trainwright.checkpoint.paths import inside
from trainwright.names import EMA_WEIGHTS_NAME
from trainwright.optim.schedule_free import find_schedule_free
from trainwright.shards import divided_as, is_sharded, local_part, reshard, whole_of_part

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]


class AveragedWeights:
    """The average of the trainable floating-point parameters of `model`; empty before `start_step`.

    Buffers (running statistics) and frozen weights are not averaged: the model's are used with the average.
    """

    def __init__(self, model: nn.Module, decay: float, start_step: int = 0, every: int = 1) -> None:
        self.decay, self.start_step, self.every = decay, start_step, every
        self._parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }
        wide = (torch.float32, torch.float64)
        # Of weights that are divided over processes, this one's part, in the memory that the optimizer changes.
        self._parts = {name: local_part(parameter) for name, parameter in self._parameters.items()}
        self._is_sharded = any(map(is_sharded, self._parameters.values()))
        self._model = model if self._is_sharded else None
        self._wide: list[torch.Tensor] = [p for p in self._parts.values() if p.dtype in wide]
        self._narrow: list[torch.Tensor] = [p for p in self._parts.values() if p.dtype not in wide]
        self._wide_average: list[torch.Tensor] = []
        self._narrow_average: list[torch.Tensor] = []
        self.has_begun = False
        self._versions: list[int] | None = None  # of the weights when training ended
        if start_step == 0:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        self._wide_average = [parameter.detach().clone() for parameter in self._wide]
        self._narrow_average = [parameter.detach().float() for parameter in self._narrow]
        self.has_begun = True

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step` updates to the average."""
        if not self.has_begun:
            if step >= self.start_step:
                self._begin()
        elif (step - self.start_step) % self.every == 0:
            if self._wide:
                torch._foreach_lerp_(self._wide_average, self._wide, 1.0 - self.decay)
            if self._narrow:
                torch._foreach_lerp_(self._narrow_average, [p.float() for p in self._narrow], 1.0 - self.decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average, of this process's part of the weights, under the names of the parameters; empty before
        `start_step`.
        """
        if not self.has_begun:
            return {}
        averages = {id(p): a for p, a in zip(self._wide, self._wide_average)}
        averages |= {id(p): a for p, a in zip(self._narrow, self._narrow_average)}
        return {name: averages[id(p)] for name, p in self._parts.items()}

    @property
    def nbytes(self) -> int:
        """Size of the average, in memory and on disk."""
        return sum(p.numel() * max(p.element_size(), 4) for p in self._parameters.values())

    def finalize(self) -> None:
        """Training is over: remember the versions of the weights that this is the average of."""
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        return [part._version for part in self._parts.values()]

    def matches_weights(self) -> bool:
        """False, with a warning, where the weights were changed since training ended."""
        if self._versions in (None, self._current_versions()):
            return True
        logger.warning(
            "The weights were changed after train(), so they are used as they are, and not the average of ema_decay, "
            "which is that of the weights before."
        )
        return False

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; after it, the trained ones again. No tensor is copied
        where both have one dtype. A no-op before `start_step`.
        """
        if self._model is not None:
            with self._in_shards(self._model):
                yield
            return
        trained = [parameter.data for parameter in self._parameters.values()]
        try:
            if self.has_begun:
                for parameter, average in zip(self._parameters.values(), self.state_dict().values(), strict=True):
                    parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for parameter, data in zip(self._parameters.values(), trained, strict=True):
                parameter.data = data

    @contextmanager
    def _in_shards(self, model: nn.Module) -> Iterator[None]:
        """`in_model` for weights that are divided: whole ones are gathered from the memory of the parts, so that is
        changed in place, at the cost of a copy of it, and what was gathered before and within is dropped.
        """
        is_current = self._versions is not None and self._versions == self._current_versions()
        trained = [part.clone() for part in self._parts.values()] if self.has_begun else []
        reshard(model)
        try:
            _copy(self.state_dict().values(), self._parts.values())
            yield
        finally:
            reshard(model)
            _copy(trained, self._parts.values())
            if is_current:
                self._versions = self._current_versions()

    def save(self, directory: Path, *, writes: bool = True) -> None:
        """Write `ema.safetensors`; a no-op before `start_step`. Of weights that are divided, all processes call it
        together, and those that are not to write take part.
        """
        if not self.has_begun:
            return
        parts = self.state_dict()
        averages = {name: whole_of_part(parts[name], p, keep=writes) for name, p in self._parameters.items()}
        if writes:
            averages = {name: average.contiguous() for name, average in averages.items()}
            sink.write("tensors", os.path.join(directory, EMA_WEIGHTS_NAME), averages, {"format": "pt"})

    @torch.no_grad()
    def load(self, directory: Path, step: int) -> None:
        """Read what `save` wrote at `step`. From a checkpoint without an average, start one from its weights, with a
        warning. Raises ValueError for the average of other parameters.
        """
        path = inside(directory, EMA_WEIGHTS_NAME)
        if not os.path.isfile(path):
            self.has_begun = step >= self.start_step
            if self.has_begun:
                logger.warning(
                    "%s holds no %s (it was saved without ema_decay): the average begins with its weights.",
                    directory,
                    EMA_WEIGHTS_NAME,
                )
                self._begin()
            return
        saved = load_file(path)
        if saved.keys() != self._parameters.keys():
            differing = sorted(saved.keys() ^ self._parameters.keys())
            raise ValueError(
                f"{path} holds the average of other parameters than are trained now; they differ in {differing[:3]}. "
                "Train the same parameters, or leave out ema_decay."
            )
        self._begin()
        for name, average in self.state_dict().items():
            average.copy_(local_part(divided_as(self._parameters[name], saved[name])))


@torch.no_grad()
def _copy(sources: Iterable[torch.Tensor], targets: Iterable[torch.Tensor]) -> None:
    for source, target in zip(sources, targets):
        target.copy_(source)


def check_optimizer(optimizer: object) -> None:
    """Raise ValueError for a schedule-free optimizer, which averages itself and swaps the average in by `eval()`."""
    holder = find_schedule_free(optimizer)
    if holder is not None:
        raise ValueError(
            f"ema_decay averages the weights, and {type(holder).__name__} averages them itself: leave out "
            "ema_decay, or choose another optim."
        )


def begin_average(
    args: Any, model: nn.Module, optimizer: object, checkpoint: Path | None, step: int
) -> AveragedWeights:
    """The average of `args.ema_decay` for a run at `step`, resumed from `checkpoint` where that is given."""
    check_optimizer(optimizer)
    average = AveragedWeights(model, args.ema_decay, args.ema_start_step, args.ema_update_steps)
    if checkpoint is not None:
        average.load(checkpoint, step)
    return average
