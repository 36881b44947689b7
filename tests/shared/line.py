"""Linear regression: the smallest model and data with which a run can be held to the bit."""

from __future__ import annotations

import torch
from torch import nn


class LineData(torch.utils.data.Dataset):
    """`length` samples of y = sum of x plus noise; counts how often samples are fetched."""

    def __init__(self, length: int = 22, width: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, width, generator=generator)
        self.y = self.x.sum(1, keepdim=True) + 0.1 * torch.randn(length, 1, generator=generator)
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.fetched.append(int(index))
        return {"x": self.x[index], "labels": self.y[index]}


class LineModel(nn.Module):
    """Linear regression that returns its mean squared error when it is given labels."""

    def __init__(self, width: int = 3, dropout: float = 0.0, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        prediction = self.linear(self.dropout(x))  # (batch, 1)
        outputs = {"logits": prediction}
        if labels is not None:
            outputs = {"loss": ((prediction - labels) ** 2).mean(), **outputs}
        return outputs


class OneWeight(nn.Module):
    """The smallest model with a loss, for what a run writes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).sum()}
