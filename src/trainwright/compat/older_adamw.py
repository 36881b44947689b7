"""`AdamW`, as scripts written for 4.x import it from `transformers`.

Owns: its arguments and defaults. Leaves to others: the update, which is torch's. Source: seed 003 (scripts of 4.31).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch's AdamW with the defaults of the older name: learning rate 0.001, epsilon 1e-6, no weight decay.

    `no_deprecation_warning` has no effect. Raises ValueError for `correct_bias=False`, which torch's
    update cannot do.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
    ) -> None:
        if not correct_bias:
            raise ValueError(
                "correct_bias=False is not supported: this AdamW is torch's, which always corrects the bias of its "
                "averages. Leave it out, or use an optimizer that has it off."
            )
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
