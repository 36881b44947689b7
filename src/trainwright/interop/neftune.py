"""NEFTune: noise on the embeddings while training.

Owns: finding the input embedding, and the hook that adds noise. Leaves to others: when it is active. Source: Jain et
al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning"; seed 004.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from trainwright.interop.models import base_model_of


def neftune_post_forward_hook(module: Any, input: Any, output: torch.Tensor) -> torch.Tensor:
    """Add uniform noise in [-a, a] with a = alpha / sqrt(seq * dim), only while training.

    `output`: (batch, seq, dim), or (batch, dim) of an embedding of whole samples. `module.neftune_noise_alpha` holds
    alpha.
    """
    if not module.training or not output.numel():
        return output
    magnitude = module.neftune_noise_alpha / (output.numel() / output.size(0)) ** 0.5
    return output + torch.zeros_like(output).uniform_(-magnitude, magnitude)


def activate(model: nn.Module, alpha: float) -> RemovableHandle:
    """Add the hook to the model's input embedding; see `deactivate`."""
    embedding = input_embedding(model)
    embedding.neftune_noise_alpha = alpha  # type: ignore[assignment]
    return embedding.register_forward_hook(neftune_post_forward_hook)


def deactivate(model: nn.Module, handle: RemovableHandle) -> None:
    handle.remove()
    del input_embedding(model).neftune_noise_alpha


def input_embedding(model: nn.Module) -> nn.Module:
    """The embedding of the input tokens: by `get_input_embeddings`, else the first `nn.Embedding` or `nn.EmbeddingBag`.

    Raises ValueError for a model without any, naming the modules it has.
    """
    base = base_model_of(model)
    getter = getattr(base, "get_input_embeddings", None)
    if getter is not None:
        with contextlib.suppress(NotImplementedError):  # raised by image models
            embedding = getter()
            if isinstance(embedding, nn.Module):
                return embedding
    for module in base.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return module
    there = sorted({type(module).__name__ for module in base.modules() if module is not base})
    raise ValueError(
        f"neftune_noise_alpha adds noise to token embeddings, but {type(base).__name__} has no nn.Embedding, only "
        f"{there}. Leave it unset, or give the model a get_input_embeddings() that returns the module to disturb."
    )
