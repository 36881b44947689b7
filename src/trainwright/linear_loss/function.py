"""The cross-entropy of linear heads, computed in chunks of rows.

Owns: loss and gradients. Leaves to others: which rows have a label at the place they predict (the model), the choice
where it is used (`heads`).

The gradients are made in the forward pass, chunk by chunk, so that no logits are held for a backward pass and none are
computed twice; the backward pass multiplies them by the incoming gradient. docs/decisions/0008 compares this with
torch's `linear_cross_entropy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from trainwright.names import IGNORE_INDEX

Pointwise = Callable[[torch.Tensor], torch.Tensor]  # logits -> logits, each from itself and its class: a soft cap ...

# Of one chunk of logits in float32. Less, and adding up the gradient of the weight takes longer than the products:
# benchmarks/linear_loss.py.
CHUNK_BYTES = 32 * 2**20
FEWEST_ROWS = 128  # with fewer, products of a CPU take longer for each row: 64 a fifth, 96 7 % (decision 0008)
# Calculated from data sheets, not measured: with 360 rows, adding up the gradient of the weight takes as long as the
# products do.
FEWEST_ROWS_ON_DEVICE = 1024
# Of the rows of a chunk, in a loss without gradients: what holds no gradients has its chunk as its peak.
SHARE_WITHOUT_GRADIENTS = 0.75
# And where a metric is given logits, of which it makes at least one more tensor as large.
SHARE_OF_METRIC = 0.5

TWICE = (
    "The backward pass of linear_cross_entropy ran {how}, and its gradients are made once, in the forward pass, and "
    "used up by the first backward pass. Set linear_cross_entropy=False for {what}."
)


class Term(NamedTuple):
    """A product that is part of the logits: `hidden @ weight.T`. Two of them where an adapter is added to a head."""

    hidden: torch.Tensor  # (..., width)
    weight: torch.Tensor  # (classes, width)


class LossInputs(NamedTuple):
    """What the losses of rows are computed from."""

    terms: tuple[Term, ...]  # hidden states (rows, width)
    bias: torch.Tensor | None
    pointwise: tuple[Pointwise, ...]
    dtype: torch.dtype  # of the products
    targets: torch.Tensor  # (rows,)

    def are_those_of(self, other: LossInputs) -> bool:
        """Whether both are the same rows, head and targets. The host waits for the answer."""
        if (self.pointwise, self.dtype, len(self.terms)) != (other.pointwise, other.dtype, len(other.terms)):
            return False
        pairs = [*zip(self.terms, other.terms)]
        is_same_head = self.bias is other.bias and all(ours.weight is theirs.weight for ours, theirs in pairs)
        return (
            is_same_head
            and torch.equal(self.targets, other.targets)
            and all(torch.equal(ours.hidden, theirs.hidden) for ours, theirs in pairs)
        )


class RowLosses(NamedTuple):
    """The losses of rows that went through a head without gradients."""

    inputs: LossInputs
    losses: torch.Tensor  # (rows,), without label smoothing


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`cross_entropy(linear(hidden, weight, bias), targets)`, a scalar, without logits of more than one chunk of rows.

    hidden: (rows, width). weight: (classes, width). targets: (rows,), class indices. bias: (classes,). reduction:
    "mean" over the rows whose target is not `ignore_index`, or "sum". Under autocast the products are in its dtype;
    sums are float32 (float64 for a float64 head). The loss can be differentiated once: RuntimeError on a second
    backward pass.
    """
    return cross_entropy_of(
        [Term(hidden, weight)],
        targets,
        bias,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def cross_entropy_of(
    terms: Sequence[Term],
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pointwise: Sequence[Pointwise] = (),
    dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    most_labels: int | None = None,
    keep: Callable[[RowLosses], None] | None = None,
) -> torch.Tensor:
    """As `linear_cross_entropy`, of the sum of `terms`, each with hidden states (rows, width), changed by `pointwise`.

    dtype: of the products; None: that of autocast, else of the hidden states. most_labels: how many rows have a label
    at most, for a device whose host is not to wait for their number: as many rows go through the head, all of them
    where it is None. With more labels than that the loss is NaN. keep: called with the losses of the rows, where no
    gradients are made.
    """
    labelled = targets != ignore_index  # (rows,)
    num_labels, num_chosen = labelled.sum(), len(targets)
    if is_on_host(targets):
        rows = labelled.nonzero().squeeze(-1)
    elif most_labels is not None and most_labels < num_chosen:
        rows = labelled.logical_not().to(torch.uint8).argsort(stable=True)[:most_labels]  # labelled ones first
    else:
        rows = None
    if rows is not None and len(rows) < num_chosen:
        num_chosen = len(rows)
        targets = targets.index_select(0, rows)
        terms = [Term(hidden.index_select(0, rows), weight) for hidden, weight in terms]
    if dtype is None:
        dtype = product_dtype(terms[0].hidden)
    # Within a function of autograd, gradients are off, and what inputs ask for is not what they will be asked for.
    settings = _Settings(tuple(pointwise), dtype, ignore_index, label_smoothing, torch.is_grad_enabled())
    if keep is not None and not settings.makes_gradients:
        settings = settings._replace(losses=torch.empty(len(targets), dtype=settings.exact, device=targets.device))
    pairs = [tensor for term in terms for tensor in term]
    total: torch.Tensor = _SumOfLosses.apply(targets, settings, bias, *pairs)  # type: ignore[no-untyped-call]
    if keep is not None and settings.losses is not None:
        keep(RowLosses(LossInputs(tuple(terms), bias, settings.pointwise, dtype, targets), settings.losses))
    if not is_on_host(targets) and rows is not None:
        total = total.where(num_labels <= num_chosen, math.nan)
    return total if reduction == "sum" else total / num_labels


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether the host reads `tensor` without waiting for a device."""
    return tensor.is_cpu


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which torch multiplies here: that of autocast where it is on, else that of the tensor."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def product(terms: Sequence[Term], bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The logits of `terms`, (..., classes), computed in `dtype`."""
    (hidden, weight), *others = terms
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        for hidden, weight in others:
            logits = logits + F.linear(hidden.to(dtype), weight.to(dtype))
    return logits


def chunk_rows(num_rows: int, num_classes: int, on_host: bool = True, share: float = 1.0) -> int:
    """How many rows go through a head of `num_classes` at once: chunks of one size, `share` of the largest."""
    most = max(FEWEST_ROWS if on_host else FEWEST_ROWS_ON_DEVICE, CHUNK_BYTES // (4 * num_classes))
    most = max(1, int(share * most))
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


class _Settings(NamedTuple):
    pointwise: tuple[Pointwise, ...]
    dtype: torch.dtype  # of the products
    ignore_index: int
    label_smoothing: float
    makes_gradients: bool
    losses: torch.Tensor | None = None  # (rows,): where the loss of each is written

    @property
    def exact(self) -> torch.dtype:
        """Of sums and of losses."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class _SumOfLosses(torch.autograd.Function):
    """The sum of the losses of rows, (), with the gradients of what asks for one."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, targets: torch.Tensor, settings: _Settings, bias: torch.Tensor | None, *pairs: torch.Tensor
    ) -> torch.Tensor:
        """pairs: hidden states and weight of each term, one after the other."""
        num_classes, dtype, exact = pairs[1].shape[0], settings.dtype, settings.exact
        inputs = (bias, *pairs)
        needs = [settings.makes_gradients and needed for needed in ctx.needs_input_grad[2:]]
        # Those of hidden states are written row by row, the others are sums over the chunks.
        gradients = [
            _room(one, exact if index % 2 == 0 else one.dtype, len(targets)) if needed and one is not None else None
            for index, (one, needed) in enumerate(zip(inputs, needs, strict=True))
        ]
        total = torch.zeros((), dtype=exact, device=targets.device)
        share = 1.0 if any(needs) else SHARE_WITHOUT_GRADIENTS
        size = chunk_rows(len(targets), num_classes, is_on_host(targets), share)
        # One for all chunks: the system clears memory that is new, which takes as long as exp().
        room = torch.empty(min(size, len(targets)), num_classes, dtype=dtype, device=targets.device)
        with torch.autocast(targets.device.type, enabled=False):
            terms = [Term(hidden.to(dtype), weight.to(dtype)) for hidden, weight in zip(pairs[::2], pairs[1::2])]
            added = None if bias is None else bias.to(dtype)
            for start in range(0, len(targets), size):
                chunk = slice(start, start + size)
                of_chunk = [Term(hidden[chunk], weight) for hidden, weight in terms]
                logits = _product_into(room[: len(of_chunk[0].hidden)], of_chunk, added)
                losses = None if settings.losses is None else settings.losses[chunk]
                loss, of_logits = _of_chunk(logits, targets[chunk], settings, any(needs), losses)
                total += loss
                if of_logits is not None:
                    _add_gradients(gradients, of_logits, of_chunk, chunk)
                del of_logits  # before the next chunk
        ctx.gradients = [
            None if sum_ is None or one is None else sum_.to(one.dtype)
            for sum_, one in zip(gradients, inputs, strict=True)
        ]
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE.format(how="with create_graph=True", what="gradients of gradients"))
        if ctx.gradients is None:
            raise RuntimeError(TWICE.format(how="a second time", what="several backward passes (retain_graph=True)"))
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if one is None else one.mul_(grad_output) for one in gradients)


def _room(tensor: torch.Tensor, dtype: torch.dtype, num_rows: int) -> torch.Tensor:
    """Where a gradient is made; the first chunk overwrites what is there, so that only no chunk needs zeros."""
    make = torch.empty_like if num_rows else torch.zeros_like
    return make(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _product_into(room: torch.Tensor, terms: Sequence[Term], bias: torch.Tensor | None) -> torch.Tensor:
    """The logits of a chunk of rows, written to `room`, (rows, classes)."""
    (hidden, weight), *others = terms
    if bias is None:
        torch.mm(hidden, weight.t(), out=room)
    else:
        torch.addmm(bias, hidden, weight.t(), out=room)
    for hidden, weight in others:
        torch.addmm(room, hidden, weight.t(), out=room)
    return room


def _of_chunk(
    raw: torch.Tensor,
    targets: torch.Tensor,
    settings: _Settings,
    needs_gradients: bool,
    of_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum of the losses of a chunk of rows, (), and its gradient of the product `raw`, (rows, classes), in the
    memory of which it may be. The loss of each row without label smoothing is written to `of_rows`.
    """
    logits = raw
    if settings.pointwise:
        with torch.set_grad_enabled(needs_gradients):
            raw = raw.detach().requires_grad_(needs_gradients)
            logits = raw
            for change in settings.pointwise:
                logits = change(logits)
    scores = logits.detach().to(settings.exact)
    # In place, but for what the gradients of pointwise functions may need.
    log_p = torch.log_softmax(scores, -1, out=None if settings.pointwise else scores)
    is_labelled = targets != settings.ignore_index  # (rows,)
    classes = targets.where(is_labelled, 0)[:, None]  # (rows, 1)
    losses = -log_p.gather(1, classes).squeeze(1)  # (rows,)
    if of_rows is not None:
        of_rows.copy_(losses)
    spread = settings.label_smoothing / log_p.shape[1]  # of the probability, over every class
    if spread:
        losses = (1 - settings.label_smoothing) * losses - spread * log_p.sum(1)
    total = losses.where(is_labelled, 0.0).sum()
    if not needs_gradients:
        return total, None
    grad = log_p.exp_()  # probabilities
    if spread:
        grad -= spread
    right = torch.full_like(classes, settings.label_smoothing - 1.0, dtype=grad.dtype)
    grad.scatter_add_(1, classes, right)
    if not is_on_host(targets):  # rows without a label are among them
        grad *= is_labelled[:, None]
    if settings.pointwise:
        (grad,) = torch.autograd.grad(logits, raw, grad.to(logits.dtype))
    return total, grad


def _add_gradients(
    gradients: Sequence[torch.Tensor | None], of_logits: torch.Tensor, terms: Sequence[Term], chunk: slice
) -> None:
    """Add a chunk's part to the gradients of the bias, and of the hidden states and weight of each term."""
    # In fp16 it would lose what the loss scale, which is not known yet, saves.
    dtype = torch.float32 if terms[0].hidden.dtype == torch.float16 else terms[0].hidden.dtype
    of_logits, is_first = of_logits.to(dtype), chunk.start == 0
    of_bias, *of_terms = gradients
    if of_bias is not None:
        _add(of_bias, of_logits.sum(0, dtype=of_bias.dtype), is_first)
    for (hidden, weight), of_hidden, of_weight in zip(terms, of_terms[::2], of_terms[1::2], strict=True):
        if of_hidden is not None:
            of_hidden[chunk] = of_logits @ weight.to(dtype)
        if of_weight is None:
            continue
        if of_weight.dtype == dtype:
            beta = 0 if is_first else 1
            torch.addmm(of_weight, of_logits.t(), hidden.to(dtype), beta=beta, out=of_weight)
        else:  # products in half precision, their sum not
            _add(of_weight, of_logits.t() @ hidden.to(dtype), is_first)


def _add(sum_: torch.Tensor, part: torch.Tensor, is_first: bool) -> None:
    sum_.copy_(part) if is_first else sum_.add_(part)
