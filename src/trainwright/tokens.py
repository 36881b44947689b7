"""Counting the tokens a model has seen.

Owns: `TokenCounter`. Leaves to others: when to count and where to show it. No host sync: padding is counted on the
device, and read with the losses at a log line. Source: seed 001 (`include_num_input_tokens_seen`).
"""

from __future__ import annotations

from typing import Any

import torch

from trainwright.names import SAMPLE_LENGTHS


class TokenCounter:
    """Tokens of the micro-batches since they were last taken, over all processes.

    `mode`: "all" counts every element of the main input, "non_padding" those the attention mask (or, without one, the
    pad token) leaves. Packs say how long their samples are.
    """

    def __init__(self, mode: str, input_name: str, pad_token_id: int | None, num_processes: int) -> None:
        self._skips_padding = mode == "non_padding"
        self._input_name, self._pad_token_id, self._num_processes = input_name, pad_token_id, num_processes
        self._on_host = 0
        self._on_device: torch.Tensor | None = None

    def add(self, inputs: Any) -> None:
        tokens = inputs.get(self._input_name)
        if not isinstance(tokens, torch.Tensor):
            return
        packs = inputs.get(SAMPLE_LENGTHS) if self._skips_padding else None
        if packs is not None and len(tokens) in (1, len(packs)):  # else rows were taken from the batch since
            self._on_host += sum(map(sum, packs)) * self._num_processes
            return
        mask = inputs.get("attention_mask") if self._skips_padding else None
        if mask is None and self._skips_padding and self._pad_token_id is not None:
            mask = tokens != self._pad_token_id
        if mask is None:
            self._on_host += tokens.numel() * self._num_processes
        else:
            count = mask.sum() * self._num_processes
            self._on_device = count if self._on_device is None else self._on_device + count

    def take_all(self) -> int:
        """All tokens since the last call; reads from the device."""
        on_host, on_device = self.take()
        return on_host if on_device is None else on_host + int(on_device)

    def take(self) -> tuple[int, torch.Tensor | None]:
        """(tokens counted on the host, tokens counted on the device) since the last call."""
        counted = self._on_host, self._on_device
        self._on_host, self._on_device = 0, None
        return counted
