"""Activation checkpointing: store few activations, and recompute the others in the backward pass.

Owns: it for any `nn.Module`, block by block; calling that of a `transformers` model. Leaves to others: finding the
blocks (`interop/blocks.py`), the arithmetic (`torch.utils.checkpoint`). Source: Chen et al. 2016, "Training Deep Nets
with Sublinear Memory Cost".
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from trainwright.interop.blocks import repeated_blocks
from trainwright.interop.loaded import is_peft_model
from trainwright.interop.models import without_cache
from trainwright.names import closest

# Added to those of torch's `checkpoint`.
OF_BLOCKS = ("every_n_layers", "offload", "modules")
_OF_TORCH = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")


def prepare_for_training(model: nn.Module, args: Any, of_engine: dict[str, Any] | None = None) -> Callable[[], None]:
    """Gradient checkpointing and `use_cache` as the arguments ask. Returns a function that undoes what was only for
    training. `of_engine`: settings with which an engine asks for checkpointing; None: it does not.

    Raises ValueError for a model whose activations cannot be checkpointed.
    """
    with contextlib.ExitStack() as undo:
        if not args.use_cache:
            undo.enter_context(without_cache(model))
        if args.gradient_checkpointing or args.activation_checkpointing or of_engine is not None:
            settings = {**(of_engine or {}), **(args.gradient_checkpointing_kwargs or {})}
            undo.callback(checkpoint_activations(model, settings))
        return undo.pop_all().close


def checkpoint_activations(model: nn.Module, kwargs: dict[str, Any]) -> Callable[[], None]:
    """Switch on activation checkpointing by `gradient_checkpointing_kwargs`; returns a function that switches it off.

    `every_n_layers`: checkpoint blocks 0, n, 2n ...; the others store their activations. `offload`: stored activations
    are moved to the host's memory. `modules`: class names of the blocks, for a model whose blocks are not recognised.
    Everything else goes to `torch.utils.checkpoint.checkpoint`. A `transformers` model checkpoints itself
    (`gradient_checkpointing_enable`) and stays switched on.

    Raises ValueError for an unknown setting, and for a model without blocks.
    """
    settings = check_settings(kwargs)
    of_torch = {name: value for name, value in settings.items() if name not in OF_BLOCKS}
    of_torch.setdefault("use_reentrant", False)  # torch's advice: the older way ignores keyword arguments
    of_blocks = {name: settings[name] for name in OF_BLOCKS if name in settings}
    does_it_itself = getattr(model, "supports_gradient_checkpointing", True) and "modules" not in of_blocks
    if of_blocks.get("offload") and not torch.cuda.is_available():
        does_it_itself = False  # transformers needs page-locked memory, which a CPU alone does not have
    newer: Any = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5
    older: Any = getattr(model, "gradient_checkpointing_enable", None)
    if of_torch["use_reentrant"] and is_peft_model(model):
        # The older way passes no gradient to weights where no input has one, and the embeddings are frozen.
        getattr(model, "enable_input_require_grads", lambda: None)()
    if newer is not None and does_it_itself:
        newer(activation_checkpointing_kwargs=of_torch, **of_blocks)
    elif older is not None and does_it_itself and not of_blocks:
        older(gradient_checkpointing_kwargs=of_torch)
    else:
        return checkpoint_blocks(model, of_blocks, of_torch)
    return lambda: None


def check_settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs`, each known and in range. Raises ValueError."""
    allowed = (*OF_BLOCKS, *_OF_TORCH)
    settings = dict(kwargs)
    for name in settings:
        if name not in allowed:
            raise ValueError(
                f"gradient_checkpointing_kwargs={kwargs!r}: {name!r} is no setting; choose among {list(allowed)}."
                f"{closest(name, allowed)}"
            )
    every = settings.get("every_n_layers", 1)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(
            f"gradient_checkpointing_kwargs={kwargs!r}: every_n_layers must be a whole number, at least 1. "
            "1 checkpoints every block."
        )
    if isinstance(settings.get("modules"), str):
        settings["modules"] = [settings["modules"]]
    return settings


def checkpoint_blocks(model: nn.Module, of_blocks: dict[str, Any], of_torch: dict[str, Any]) -> Callable[[], None]:
    """Checkpoint the blocks of any model by replacing their `forward`: no weight changes its name. Returns a function
    that switches it off.
    """
    blocks = repeated_blocks(model, of_blocks.get("modules"), asked_by="gradient_checkpointing=True")
    chosen = blocks[:: of_blocks.get("every_n_layers", 1)]
    before = [(block, block.__dict__.get("forward")) for block in chosen]
    for block in chosen:
        block.forward = _recomputed(block, of_blocks.get("offload", False), of_torch)  # type: ignore[method-assign]

    def undo() -> None:
        for block, forward in before:
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward  # type: ignore[method-assign]

    return undo


def _recomputed(block: nn.Module, offload: bool, of_torch: dict[str, Any]) -> Callable[..., Any]:
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else contextlib.nullcontext():
            return checkpoint(forward, *args, **of_torch, **kwargs)

    run.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return run
