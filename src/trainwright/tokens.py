"""Counting the tokens a model has seen.

Owns: `TokenCounter`. Leaves to others: when to count and where to show it. No host sync: what lies on a device is
counted there, and read with the losses at a log line. Source: seed 001 (`include_num_input_tokens_seen`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainwright.names import SAMPLE_LENGTHS


class TokenCounter:
    """Tokens of the micro-batches, over all processes.

    `mode`: "all" counts every element of the main input, "non_padding" those the attention mask (or, without one, the
    pad token) leaves. Packs say how long their samples are. A process counts its own tokens for all; what the others
    really had is put right in `take`, where the processes meet.
    """

    def __init__(self, mode: str, input_name: str, pad_token_id: int | None, num_processes: int) -> None:
        self._skips_padding = mode == "non_padding"
        self._input_name, self._pad_token_id, self._num_processes = input_name, pad_token_id, num_processes
        self._on_host = 0
        self._on_device: torch.Tensor | None = None

    def add(self, inputs: Any) -> int:
        """Count a micro-batch. Returns the tokens that are known now: 0 where they are counted on a device."""
        counted = self._count(inputs)
        if isinstance(counted, int):
            self._on_host += counted
            return counted
        self._on_device = counted if self._on_device is None else self._on_device + counted
        return 0

    def _count(self, inputs: Any) -> int | torch.Tensor:
        tokens = inputs.get(self._input_name)
        if not isinstance(tokens, torch.Tensor):
            return 0
        if not self._skips_padding:
            return tokens.numel() * self._num_processes
        packs = inputs.get(SAMPLE_LENGTHS)
        if packs is not None and len(tokens) in (1, len(packs)):  # else rows were taken from the batch since
            return int(sum(map(sum, packs))) * self._num_processes
        mask = inputs.get("attention_mask")
        if mask is None and self._pad_token_id is None:
            return tokens.numel() * self._num_processes
        if mask is None:
            mask = tokens != self._pad_token_id
        if mask.device.type == "cpu" and mask.dtype != torch.bfloat16:  # which NumPy has not; it reads without torch
            return int(mask.detach().numpy().sum()) * self._num_processes
        return mask.sum() * self._num_processes  # type: ignore[no-any-return]

    def take_all(self, mean: Callable[[torch.Tensor], torch.Tensor] = lambda count: count) -> int:
        """How much the sum of what `add` returned since the last call falls short of all tokens; reads from the device.

        `mean`: averages a tensor over the processes, which call this together.
        """
        in_state, counted = self.take()
        if counted is None:
            return 0
        if not isinstance(counted, torch.Tensor):
            counted = torch.tensor(counted)
        return round(float(mean(counted.float() if counted.device.type == "mps" else counted.double()))) - in_state

    def take(self) -> tuple[int, torch.Tensor | int | None]:
        """(sum of what `add` returned, all tokens by this process's count) since the last call.

        None for the second where nothing is to be put right: one process, and nothing counted on a device.
        """
        on_host, on_device = self._on_host, self._on_device
        self._on_host, self._on_device = 0, None
        if on_device is not None:
            return on_host, on_device + on_host
        return on_host, on_host if self._num_processes > 1 else None
