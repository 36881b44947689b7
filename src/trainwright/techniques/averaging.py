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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from trainwright.checkpoint import sink
from trainwright.checkpoint.paths import inside
from trainwright.names import EMA_WEIGHTS_NAME
from trainwright.optim.schedule_free import find_schedule_free

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
        self._wide: list[torch.Tensor] = [p for p in self._parameters.values() if p.dtype in wide]
        self._narrow: list[torch.Tensor] = [p for p in self._parameters.values() if p.dtype not in wide]
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
        """The average under the names of the parameters; empty before `start_step`."""
        if not self.has_begun:
            return {}
        averages = {id(p): a for p, a in zip(self._wide, self._wide_average)}
        averages |= {id(p): a for p, a in zip(self._narrow, self._narrow_average)}
        return {name: averages[id(p)] for name, p in self._parameters.items()}

    @property
    def nbytes(self) -> int:
        """Size of the average, in memory and on disk."""
        return sum(p.numel() * max(p.element_size(), 4) for p in self._parameters.values())

    def finalize(self) -> None:
        """Training is over: remember the versions of the weights that this is the average of."""
        self._versions = [parameter._version for parameter in self._parameters.values()]

    def matches_weights(self) -> bool:
        """False, with a warning, where the weights were changed since training ended."""
        if self._versions in (None, [parameter._version for parameter in self._parameters.values()]):
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
        trained = [parameter.data for parameter in self._parameters.values()]
        try:
            if self.has_begun:
                for parameter, average in zip(self._parameters.values(), self.state_dict().values(), strict=True):
                    parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for parameter, data in zip(self._parameters.values(), trained, strict=True):
                parameter.data = data

    def save(self, directory: Path) -> None:
        """Write `ema.safetensors`; a no-op before `start_step`."""
        if self.has_begun:
            averages = {name: average.contiguous() for name, average in self.state_dict().items()}
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
            average.copy_(saved[name])


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
