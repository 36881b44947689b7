"""The work that every loop of this benchmark does: a model so small that the loop around it is what costs.

Owns: model, data, optimizer settings, and the collator through which a run is measured. Leaves to others: the loops
(`contenders`), what is measured (`probes`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BATCH_SIZE, WIDTH, LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 8, 16, 1e-3, 0.01, 1.0
LOGGING_STEPS, EVAL_BATCHES = 100, 4


class ToyModel(nn.Module):
    """Two linear layers; returns its mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        prediction = self.head(torch.tanh(self.hidden(x)))  # (batch, 1)
        return {"loss": ((prediction - labels) ** 2).mean(), "logits": prediction}


class ToyData(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """`length` samples, so many that no run comes to the end of an epoch."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, WIDTH, generator=generator)
        self.y = self.x.sum(1, keepdim=True)  # (64, 1)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = index % 64
        return {"x": self.x[row], "labels": self.y[row]}


class MeasuringCollator:
    """Builds batches, and starts and stops a measurement between two of them.

    Every loop must call its collator once per micro-batch, so each is measured over exactly the same work and its
    set-up is left out, without a hook of any framework. `first`, `last`: the batches, counted from 1, between which to
    measure.
    """

    def __init__(self, first: int, last: int, start: Callable[[], None], stop: Callable[[], None]) -> None:
        self.first, self.last, self.start, self.stop = first, last, start, stop
        self.num_batches = 0

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.num_batches += 1
        if self.num_batches == self.first:
            self.start()
        elif self.num_batches == self.last:
            self.stop()
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}  # each (batch, ...)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights with decay and biases without, as the trainers group them, so that all optimizers do the same work."""
    named = list(model.named_parameters())
    return [
        {"params": [value for name, value in named if "bias" not in name], "weight_decay": WEIGHT_DECAY},
        {"params": [value for name, value in named if "bias" in name], "weight_decay": 0.0},
    ]


def optimizer_and_schedule(model: nn.Module, num_steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and a linear schedule, as the trainers build them from the same settings."""
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / num_steps))
    return optimizer, schedule
