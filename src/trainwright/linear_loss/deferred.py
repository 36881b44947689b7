"""Logits that are not computed until something other than their cross-entropy needs them.

Owns: `DeferredLogits`, and which operations leave it deferred. Leaves to others: putting one in the place of a head's
output (`heads`), the loss (`function`).

Each class of models computes its loss from its logits differently: shifted or not, flattened, cast, capped, divided by
the items of an update, with other losses added. None of that is repeated here: the model's code runs as it is, on a
tensor that has the logits' shape and holds hidden states and weight in their place. What it does to rows is done to the
hidden states; what it does to each number is recorded; `cross_entropy` of the result is computed in chunks. Every other
operation computes the logits first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from trainwright.linear_loss.function import (
    SHARE_OF_METRIC,
    LossInputs,
    Pointwise,
    RowLosses,
    Term,
    chunk_rows,
    cross_entropy_of,
    is_on_host,
    product,
    product_dtype,
)
from trainwright.names import IGNORE_INDEX


class Watcher:
    """What is done with deferred logits. A subclass acts on it.

    most_labels: see `cross_entropy_of`; of the batch of which they are the logits.
    """

    most_labels: int | None = None

    def needs_logits(self, operation: str) -> None:
        """`operation`, of torch, needs the logits themselves."""

    def before_loss(self, logits: DeferredLogits, targets: torch.Tensor, **settings: Any) -> None:
        """The cross-entropy of `logits`, (rows, classes), is about to be computed, with `settings` of
        `cross_entropy_of`.
        """

    def after_loss(self, logits: DeferredLogits, targets: torch.Tensor, **settings: Any) -> None:
        """It has been computed."""


class DeferredLogits(torch.Tensor):
    """Logits (..., classes) that are a sum of products of hidden states and weights, not computed yet.

    terms: those products, hidden states (..., width) and weight (classes, width). bias: (classes,). pointwise: what is
    done to each number, in order. `materialized()` computes them, `chunks()` a part of the rows at a time.
    """

    terms: tuple[Term, ...]
    bias: torch.Tensor | None
    pointwise: tuple[Pointwise, ...]
    of_product: torch.dtype
    watcher: Watcher
    computed: torch.Tensor | None
    known: list[RowLosses]  # of these logits, whatever was changed since the head gave them

    @staticmethod
    def __new__(
        cls,
        terms: Sequence[Term],
        bias: torch.Tensor | None = None,
        *,
        pointwise: tuple[Pointwise, ...] = (),
        of_product: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        watcher: Watcher | None = None,
        known: list[RowLosses] | None = None,
    ) -> DeferredLogits:
        (hidden, weight), *_ = terms
        of_product = product_dtype(hidden) if of_product is None else of_product
        shape = (*hidden.shape[:-1], weight.shape[0])
        self: DeferredLogits = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=of_product if dtype is None else dtype, device=hidden.device
        )
        self.terms, self.bias, self.pointwise = tuple(terms), bias, pointwise
        self.of_product, self.computed = of_product, None
        self.watcher = Watcher() if watcher is None else watcher
        self.known = [] if known is None else known
        return self

    def changed(self, **changes: Any) -> DeferredLogits:
        """These, with other `terms`, `bias`, `pointwise` or `dtype`."""
        with torch._C.DisableTorchFunctionSubclass():
            dtype = self.dtype
        now = {
            "terms": self.terms,
            "bias": self.bias,
            "pointwise": self.pointwise,
            "of_product": self.of_product,
            "dtype": dtype,
            "watcher": self.watcher,
            "known": self.known,
        }
        return DeferredLogits(**{**now, **changes})

    def materialized(self) -> torch.Tensor:
        """The logits, (..., classes), as the model computes them. From then on these are no longer deferred, so that
        what writes into them is seen by what reads them later.
        """
        if self.computed is None:
            self.computed = self._changed_product(self.terms)
        return self.computed

    def of_rows(self, mask: torch.Tensor | None = None) -> DeferredLogits:
        """Those of the rows where `mask`, (...,), is True, (rows, classes), in order; of all of them without it."""
        rows = [Term(hidden.flatten(0, -2), weight) for hidden, weight in self.terms]
        if mask is not None:
            rows = [Term(hidden[mask.flatten()], weight) for hidden, weight in rows]
        return self.changed(terms=rows)

    def losses(self, targets: torch.Tensor) -> torch.Tensor | None:
        """The cross-entropy of each row, (rows,), of logits (rows, classes), where the model's loss has computed just
        these; None elsewhere. targets: (rows,).
        """
        with torch._C.DisableTorchFunctionSubclass():
            is_rounded = torch.promote_types(self.dtype, self.of_product) != self.dtype
        if is_rounded:
            return None
        asked = LossInputs(self.terms, self.bias, self.pointwise, self.of_product, targets)
        return next((rows.losses for rows in self.known if rows.inputs.are_those_of(asked)), None)

    def chunks(self) -> Iterator[torch.Tensor]:
        """Logits (rows, classes), computed one chunk of rows after the other, in order."""
        rows = len(self.terms[0].hidden)
        size = chunk_rows(rows, self.terms[0].weight.shape[0], is_on_host(self.terms[0].hidden), SHARE_OF_METRIC)
        for start in range(0, rows, size):
            yield self._changed_product([Term(hidden[start : start + size], weight) for hidden, weight in self.terms])

    def _changed_product(self, terms: Sequence[Term]) -> torch.Tensor:
        logits = product(terms, self.bias, self.of_product)
        for change in self.pointwise:
            logits = change(logits)
        with torch._C.DisableTorchFunctionSubclass():
            return logits.to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        defer = _STAYS_DEFERRED.get(func)
        is_computed = any(isinstance(one, DeferredLogits) and one.computed is not None for one in args)
        result = NotImplemented if defer is None or is_computed else defer(*args, **kwargs)
        if result is not NotImplemented:
            return result
        args, kwargs = _computed((args, kwargs), getattr(func, "__name__", str(func)))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Reached from C++ only, where no `__torch_function__` is asked."""
        args, kwargs = _computed((args, kwargs or {}), str(func))
        return func(*args, **kwargs)


def _computed(value: Any, operation: str) -> Any:
    """`value` with the logits themselves in the place of deferred ones, for `operation`."""
    if isinstance(value, DeferredLogits):
        value.watcher.needs_logits(operation.strip("_"))
        return value.materialized()
    if isinstance(value, (tuple, list)):
        return type(value)([_computed(item, operation) for item in value])
    if isinstance(value, dict):
        return {key: _computed(item, operation) for key, item in value.items()}
    return value


_QUESTIONS = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "grad_fn",
      "is_leaf", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")),
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.ndimension,
    torch.Tensor.is_contiguous,
    torch.Tensor.stride,
    torch.Tensor.is_floating_point, torch.is_floating_point, torch.numel, torch.Tensor.get_device,
    torch.Tensor.requires_grad_, torch.Tensor.is_complex, torch.is_complex,
}  # fmt: skip


def _of_rows(logits: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Deferred logits after a change of their rows, which is made to the hidden states."""
    return logits.changed(terms=[Term(change(hidden), weight) for hidden, weight in logits.terms])


def _view(logits: Any, *shape: Any, **kwargs: Any) -> Any:
    """A view or a reshape that leaves the classes as they are."""
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if kwargs or not shape or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    num_classes = logits.terms[0].weight.shape[0]
    num_rows = logits.terms[0].hidden.shape[:-1].numel()
    *rows, last = shape
    known = functools.reduce(lambda a, b: a * b, (size for size in rows if size != -1), 1)
    if last == -1 and -1 not in rows and known == num_rows:
        last = num_classes
    if last != num_classes or (-1 in rows and (rows.count(-1) > 1 or known == 0 or num_rows % known)):
        return NotImplemented
    rows = [num_rows // known if size == -1 else size for size in rows]
    return _of_rows(logits, lambda hidden: hidden.reshape(*rows, hidden.shape[-1]))


def _flatten(logits: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    ndim = logits.terms[0].hidden.ndim
    end = end_dim % ndim
    return NotImplemented if end == ndim - 1 else _of_rows(logits, lambda hidden: hidden.flatten(start_dim, end))


def _item(logits: Any, index: Any) -> Any:
    """An index of rows: slices and numbers, or one tensor, that leave the classes as they are."""
    parts = index if isinstance(index, tuple) else (index,)
    ndim = logits.terms[0].hidden.ndim
    if any(isinstance(part, DeferredLogits) for part in parts):
        return NotImplemented
    if len(parts) == 1 and isinstance(parts[0], torch.Tensor) and 0 < parts[0].ndim < ndim:
        is_of_rows = parts[0].dtype in (torch.bool, torch.int64)
        return _of_rows(logits, lambda hidden: hidden[parts[0]]) if is_of_rows else NotImplemented
    if not all(part is Ellipsis or isinstance(part, (slice, int)) for part in parts) or parts.count(Ellipsis) > 1:
        return NotImplemented
    named = len(parts) - (Ellipsis in parts)
    if named == ndim or (Ellipsis in parts and parts[-1] is not Ellipsis):  # names the classes
        if parts[-1] != slice(None):
            return NotImplemented
    return _of_rows(logits, lambda hidden: hidden[index]) if named <= ndim else NotImplemented


def _cast(logits: Any, *args: Any, **kwargs: Any) -> Any:
    """A change of dtype, where nothing else is asked: what follows is computed in it."""
    with torch._C.DisableTorchFunctionSubclass():
        device, dtype = logits.device, logits.dtype
    asked = [*args, *(value for name, value in kwargs.items() if name not in ("non_blocking", "copy"))]
    for one in asked:
        if isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, (str, torch.device)):
            if torch.device(one).type != device.type or torch.device(one).index not in (None, device.index):
                return NotImplemented
        elif not isinstance(one, bool):
            return NotImplemented
    if not dtype.is_floating_point:
        return NotImplemented
    return _to(logits, dtype)


def _to(logits: Any, dtype: torch.dtype) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return logits if logits.dtype == dtype else logits.changed(dtype=dtype)


def _pointwise(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func` of logits and a number, or what has a number for each class and no gradient; of logits alone."""

    def defer(logits: Any, other: Any = None, **kwargs: Any) -> Any:
        if not isinstance(logits, DeferredLogits) and func in _COMMUTE:
            logits, other = other, logits
        if kwargs or not isinstance(logits, DeferredLogits):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            dtype = logits.dtype
        if isinstance(other, DeferredLogits):
            return _sum(logits, other) if func in _SUMS else NotImplemented
        if isinstance(other, torch.Tensor):
            if other.requires_grad or other.shape[-1:].numel() not in (1, logits.terms[0].weight.shape[0]):
                return NotImplemented
            if other.numel() != other.shape[-1:].numel():
                return NotImplemented
            other = other.reshape(other.shape[-1:])
            result = torch.result_type(other, torch.empty((1,) * max(1, other.ndim), dtype=dtype))
        elif other is None or isinstance(other, (int, float)):
            result = dtype
            if func in _PRODUCTS and logits.bias is None and not logits.pointwise:
                return _of_rows(logits, lambda hidden: func(hidden, other))
        else:
            return NotImplemented
        arguments = () if other is None else (other,)
        change = functools.partial(_apply, func, dtype, arguments)
        return logits.changed(pointwise=(*logits.pointwise, change), dtype=result)

    return defer


def _apply(
    func: Callable[..., torch.Tensor], dtype: torch.dtype, arguments: tuple[Any, ...], values: torch.Tensor
) -> torch.Tensor:
    return func(values.to(dtype), *arguments)


def _sum(logits: Any, other: Any) -> Any:
    """The sum of two products, as of a head and its adapter."""
    if logits.pointwise or other.pointwise or other.bias is not None or logits.of_product != other.of_product:
        return NotImplemented
    return logits.changed(terms=[*logits.terms, *other.terms])


def _cross_entropy(
    logits: Any,
    targets: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = IGNORE_INDEX,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    is_plain = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum")
    if not (is_plain and isinstance(logits, DeferredLogits) and isinstance(targets, torch.Tensor)):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        dtype, ndim = logits.dtype, logits.ndim
    if ndim != 2 or targets.ndim != 1 or targets.dtype != torch.int64 or isinstance(targets, DeferredLogits):
        return NotImplemented
    settings: dict[str, Any] = {
        "pointwise": logits.pointwise,
        "dtype": logits.of_product,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    logits.watcher.before_loss(logits, targets, **settings)
    most_labels = logits.watcher.most_labels
    keep = logits.known.append if is_on_host(targets) else None
    loss = cross_entropy_of(logits.terms, targets, logits.bias, most_labels=most_labels, keep=keep, **settings)
    logits.watcher.after_loss(logits, targets, **settings)
    return loss if torch.is_autocast_enabled(loss.device.type) else loss.to(dtype)


_T = torch.Tensor
_COMMUTE = {_T.add, _T.__add__, _T.__radd__, torch.add, _T.mul, _T.__mul__, _T.__rmul__, torch.mul}
_SUMS = {_T.add, _T.__add__, _T.__radd__, torch.add}
_PRODUCTS = {_T.mul, _T.__mul__, _T.__rmul__, torch.mul, _T.div, _T.__truediv__, torch.div, torch.true_divide}
_POINTWISE: set[Any] = {
    *_COMMUTE, _T.div, _T.__truediv__, torch.div, torch.true_divide, _T.sub, _T.__sub__, torch.sub, torch.tanh, _T.tanh,
}  # fmt: skip
_STAYS_DEFERRED: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    **dict.fromkeys((_T.view, _T.reshape, torch.reshape), _view),
    **dict.fromkeys((_T.flatten, torch.flatten), _flatten),
    _T.__getitem__: _item,
    _T.to: _cast,
    _T.float: lambda logits: _to(logits, torch.float32),
    _T.contiguous: lambda logits, **_: logits,
    **dict.fromkeys((_T.clone, torch.clone), lambda logits, **_: logits.changed()),
    **{func: _pointwise(func) for func in _POINTWISE},
}
