"""Attention within each sample of a pack: the attention function of a `transformers` model, called once per sample.

Owns: switching a model's layers to it and back, passing sample boundaries to a layer, the mask rule of a layer. Leaves
to others: when to switch (packed_attention), the check that it is equivalent (packed_checks).

Every layer that looks up its attention in `ALL_ATTENTION_FUNCTIONS` gets a copy of its config that names ours; the
model's config, which is saved and makes masks, is unchanged. Ours calls the layer's original function ("sdpa", or the
module's "eager" function), so scaling, dropout, soft caps, sinks and grouped heads are the model's. Without packs
(evaluation) it is the same call as before. Boundaries are passed as the attention mask, which every model passes on and
which survives recomputed activations: int32 sample indices, `(packs, 1, 1, length)`.

Source: the registry is documented ("Attention interface"); that a 4D mask reaches the layers unchanged, and that layers
name their window `sliding_window`, was observed in releases 4.55 and 5.23.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

PREFIX = "trainwright_packed_"
SWITCHABLE = ("sdpa", "eager")  # attention implementations
# Adjacent samples of together at most this many tokens are one call with a mask: a call costs more than so few pairs.
# With samples of 40 tokens that saves 2 % of a step on a CPU; on a GPU it bounds the launches of a pack.
MERGED = 64
REMEMBERED = 8  # cached layouts; another is read from its mask again, which costs a sync on a GPU


class Layout:
    """The sample boundaries of a batch of packs, and the masks for them.

    `lengths`: of the samples of each pack, which together fill its row.
    """

    def __init__(self, lengths: list[list[int]]) -> None:
        self.blocks: list[list[int]] = []  # lengths of samples that share a call
        for row in lengths:
            open_block: list[int] = []
            for length in row:
                if open_block and sum(open_block) + length <= MERGED:
                    open_block.append(length)
                else:
                    open_block = [length]
                    self.blocks.append(open_block)
        self.sizes = [sum(block) for block in self.blocks]
        self._masks: dict[Any, torch.Tensor] = {}

    def mask(
        self, block: list[int], is_causal: bool, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The attention mask of a block, `(1, 1, size, size)`: booleans, or a float `dtype` to add to scores."""
        size, key = sum(block), (tuple(block) if len(block) > 1 else (), is_causal, window, dtype, device)
        known = self._masks.get(key)
        if known is None or known.shape[-1] < size:  # a longer mask begins with the shorter one
            attends = allowed_pairs(block, is_causal, window).to(device)
            known = attends[None, None]
            if dtype != torch.bool:
                lowest = torch.finfo(dtype).min
                known = torch.zeros(known.shape, dtype=dtype, device=device).masked_fill_(~known, lowest)
            self._masks[key] = known
        return known[..., :size, :size]


def allowed_pairs(lengths: list[int], is_causal: bool, window: int | None) -> torch.Tensor:
    """Booleans `(sum of lengths, sum of lengths)`: whether a token (row) attends to another one of its sample."""
    numbers = torch.repeat_interleave(torch.tensor(lengths))
    attends = numbers[:, None] == numbers[None, :]
    if window is not None:
        attends = attends.triu(1 - window).tril(window - 1)
    return attends.tril() if is_causal else attends


_original: dict[tuple[str, type[nn.Module]], Callable[..., Any]] = {}  # attention function of the layers of a class
_observer: Callable[..., None] | None = None
_recent: deque[tuple[torch.Tensor, Layout]] = deque(maxlen=REMEMBERED)  # holds the masks, so that no memory is reused


def borders(numbers: torch.Tensor, lengths: list[list[int]] | None) -> torch.Tensor:
    """The mask that passes sample indices, `numbers` `(packs, length)`, int32, to switched layers.

    `lengths`: of the samples of each pack without its padding, where the host knows them; None: read from the device.
    """
    rows, length = numbers.shape
    mask = numbers.to(torch.int32)[:, None, None, :]
    if lengths is None or len(lengths) != rows:
        layout = _read(mask)
    else:
        free = [length - sum(row) for row in lengths]
        layout = Layout([[*row, left] if left else list(row) for row, left in zip(lengths, free)])
    _recent.append((mask, layout))
    return mask


def _layout_of(mask: torch.Tensor) -> Layout:
    # A copy, because threads of nn.DataParallel append concurrently. Recomputed activations get views of the mask.
    for known, layout in _recent.copy():
        if known.data_ptr() == mask.data_ptr() and known.shape == mask.shape and known.device == mask.device:
            return layout
    layout = _read(mask)
    _recent.append((mask, layout))
    return layout


def _read(mask: torch.Tensor) -> Layout:
    return Layout([torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in mask[:, 0, 0].cpu()])


def _attend(
    implementation: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """The attention function of switched layers. Queries, keys and values: `(batch, heads, length, width)`."""
    attention = _original[implementation, type(module)]
    if _observer is not None:
        _observer(module, implementation, attention_mask, query.shape[2], *_rule(module, kwargs))
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return attention(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    return _attend_by_sample(implementation, attention, module, query, key, value, attention_mask, **kwargs), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_sample(
    implementation: str,
    attention: Callable[..., Any],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """`(packs, length, heads, width)`, one call per block. A graph break under torch.compile: its shapes differ in
    every
    batch."""
    rows, _, length, _ = query.shape
    if mask.shape != (rows, 1, 1, length) or key.shape[2] != length or kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} was given a mask of shape {tuple(mask.shape)} for {rows} packs of {length} "
            f"tokens and {key.shape[2]} keys, or a bias over pairs of tokens: attention by sample needs the borders of "
            "samples as they were made, and looks at no other tokens than those of the pack."
        )
    layout, is_causal, window = _layout_of(mask), *_rule(module, kwargs)
    dtype = torch.bool if implementation == "sdpa" else query.dtype
    outputs = []
    parts = zip(layout.blocks, *(_pieces(states, layout.sizes) for states in (query, key, value)))
    for block, *states in parts:
        is_bounded = len(block) > 1 or (window is not None and window < block[0])
        if implementation == "sdpa":
            kwargs["is_causal"] = is_causal and not is_bounded
        needs_mask = is_bounded or (implementation == "eager" and is_causal)
        of_block = layout.mask(block, is_causal, window, dtype, query.device) if needs_mask else None
        outputs.append(attention(module, *states, of_block, **kwargs)[0])  # (1, size, heads, width)
    return torch.cat(outputs, dim=1).view(rows, length, *outputs[0].shape[2:])


def _pieces(states: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """Split `(packs, heads, length, width)` into `(1, heads, size, width)`. One split: its backward pass concatenates
    the gradients, while that of each slice would write the whole length."""
    return torch.split(states.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None], sizes, dim=2)


def _rule(module: Any, kwargs: dict[str, Any]) -> tuple[bool, int | None]:
    """(is_causal, window) of a layer. A False for `is_causal` may mean that the mask is causal."""
    is_causal = bool(kwargs.get("is_causal") or getattr(module, "is_causal", True))
    return is_causal, kwargs.get("sliding_window")


def _globals_of(layer: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = getattr(inspect.unwrap(type(layer).forward), "__globals__", {})
    return found


def switched_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that are switched now."""
    names = tuple(PREFIX + implementation for implementation in SWITCHABLE)
    return [
        layer
        for layer in model.modules()
        if getattr(getattr(layer, "config", None), "_attn_implementation", None) in names
    ]


def switchable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model whose attention, "sdpa" or "eager", comes from the registry of `transformers`."""
    found = []
    for layer in model.modules():
        code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
        if "ALL_ATTENTION_FUNCTIONS" not in getattr(code, "co_names", ()):
            continue
        implementation = getattr(getattr(layer, "config", None), "_attn_implementation", None)
        has_eager = implementation != "eager" or "eager_attention_forward" in _globals_of(layer)
        if implementation in SWITCHABLE and has_eager:
            found.append(layer)
    return found


@contextlib.contextmanager
def per_sample_attention(model: nn.Module) -> Iterator[None]:
    """Within the block the switchable layers of `model` attend by sample where their mask holds boundaries."""
    before: list[tuple[Any, Any]] = []
    copies: dict[int, Any] = {}
    try:
        for layer in switchable_layers(model):
            config: Any = layer.config
            name = config._attn_implementation
            registry = _globals_of(layer)["ALL_ATTENTION_FUNCTIONS"]
            registry.register(PREFIX + name, functools.partial(_attend, name))
            is_eager = name == "eager"
            _original[name, type(layer)] = _globals_of(layer)["eager_attention_forward"] if is_eager else registry[name]
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                copies[id(config)]._attn_implementation_internal = PREFIX + name  # its setter changes inner configs
            before.append((layer, config))
            layer.config = copies[id(config)]
        yield
    finally:
        for layer, config in before:
            layer.config = config
        _recent.clear()


@contextlib.contextmanager
def observed(observer: Callable[..., None]) -> Iterator[None]:
    """Within the block each call of a switched layer first calls
    `observer(layer, implementation, mask, length, is_causal, window)`.
    """
    global _observer
    _observer = observer
    try:
        yield
    finally:
        _observer = None
