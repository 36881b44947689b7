"""Optimizers that update weights during the backward pass: LOMO, AdaLomo, and the layer-wise GaLore and APOLLO.

Owns: recognising them, and which arguments exclude them. Leaves to others: the updates (`lomo.py`, `layerwise.py`).
The gradients of an update never exist all at once, so nothing may need them together.
"""

from __future__ import annotations

from typing import Any

from trainwright.interop.loaded import is_instance_of


def is_lomo(optimizer: object) -> bool:
    """Whether `optimizer` replaces `loss.backward()`."""
    return is_instance_of(optimizer, "lomo_optim", "Lomo", "AdaLomo")


def updates_in_backward(optimizer: object) -> bool:
    """Whether the weights are updated when the backward pass is over."""
    return is_lomo(optimizer) or getattr(optimizer, "updates_in_backward", False) is True


def check_in_backward(name: str, args: Any, instead: str) -> None:
    """Raise ValueError for an argument that needs the gradients of a whole update.

    `name` is the optimizer's, `instead` the name of one that could be used with the argument.
    """
    accumulation = getattr(args, "gradient_accumulation_steps", 1)
    if accumulation != 1:
        raise ValueError(
            f"optim={name!r} updates during every backward pass, so gradient_accumulation_steps={accumulation} "
            f"cannot work; set it to 1 or use optim={instead!r}."
        )
    if getattr(getattr(args, "parallel_mode", None), "value", "") == "distributed":
        raise ValueError(
            f"optim={name!r} updates before gradients are averaged over processes, so it cannot train on "
            f"several; use one process or optim={instead!r}."
        )
    if getattr(args, "fp16", False):
        raise ValueError(
            f"optim={name!r} updates before the gradients of fp16 are scaled back, so fp16=True cannot work; use "
            f"bf16=True or optim={instead!r}."
        )
