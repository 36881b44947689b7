"""The block that repeats in small language models for engines, and how many processes there are."""

from __future__ import annotations

import os

import torch
from torch import nn


class Block(nn.Module):
    """A residual block of width 16, whose inner layer has `inner` features."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(16), nn.Linear(16, inner), nn.Linear(inner, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.outer(torch.tanh(self.inner(self.norm(hidden))))


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
