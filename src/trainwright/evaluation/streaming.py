"""Metrics that see each batch and keep none: what may be passed as `compute_metrics` besides a function.

Owns: recognising such objects (ours, those of torchmetrics, anything with update/compute/reset or with
add_batch/compute), their names, and one interface over them. Leaves to others: what they measure (`trainwright.metrics`
and the libraries), the loop.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainwright.interop.loaded import is_instance_of
from trainwright.linear_loss.deferred import DeferredLogits
from trainwright.metrics import Perplexity, StreamingMetric, counts_labels, measures_losses
from trainwright.names import IGNORE_INDEX
from trainwright.nested import Nested, find_batch_size, nested_numpify

ToAll = Callable[[Nested], Nested]  # rows of all processes


def is_streaming(metric: Any) -> bool:
    """Whether `metric` is counted batch by batch instead of being called with all predictions."""
    if isinstance(metric, (dict, list, tuple)):
        return any(is_streaming(one) for one in (metric.values() if isinstance(metric, dict) else metric))
    if isinstance(metric, type) or not callable(getattr(metric, "compute", None)):
        return False
    if callable(getattr(metric, "update", None)) and callable(getattr(metric, "reset", None)):
        # A function object for batch_eval_metrics may have methods of these names for itself.
        return not (callable(metric) and _takes_compute_result(metric))
    return callable(getattr(metric, "add_batch", None))


def only_counts_labels(metrics: Any) -> bool:
    """Whether `metrics` are streaming ones that count each label by its logits alone (`counts_labels`)."""
    return is_streaming(metrics) and all(map(counts_labels, named_metrics(metrics).values()))


def is_streaming_class(class_: type) -> bool:
    """Whether instances of `class_` would be streaming metrics, so that the class itself was passed by mistake."""
    return all(callable(getattr(class_, name, None)) for name in ("update", "compute", "reset"))


def _takes_compute_result(metric: Any) -> bool:
    try:
        return "compute_result" in inspect.signature(metric).parameters
    except (TypeError, ValueError):
        return False


class StreamingMetrics:
    """All metrics of an evaluation.

    metrics: one metric, a list of them, or a dict by name. device: where predictions lie. labels_are_shifted: position
    t predicts label t + 1; metrics that were not told otherwise then compare so. sum_over_processes, without_repeats:
    for several processes, `Strategy.sum` and `Strategy.without_repeats`.

    Raises TypeError for an entry that is no such metric, ValueError for two of one name.
    """

    def __init__(
        self,
        metrics: Any,
        *,
        device: torch.device | None = None,
        labels_are_shifted: bool = False,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
        without_repeats: Callable[[Nested], Nested] | None = None,
    ) -> None:
        self.labels_are_shifted = labels_are_shifted
        self.sum_over_processes = sum_over_processes
        self.without_repeats = without_repeats
        self.metrics = named_metrics(metrics)
        self.num_batches = 0
        # Ours and torchmetrics' are added up over processes at the end; others are given the rows of all.
        self._summed = {name: metric for name, metric in self.metrics.items() if _adds_up(metric)}
        self._gathered = {name: metric for name, metric in self.metrics.items() if not _adds_up(metric)}
        if device is not None:
            for metric in self.metrics.values():
                if _is_torchmetrics(metric):
                    metric.to(device)

    def reset(self) -> None:
        """Begin an evaluation."""
        self.num_batches = 0
        for metric in self.metrics.values():
            if hasattr(metric, "reset"):
                metric.reset()

    def update(self, predictions: Nested, labels: Nested, to_all: ToAll) -> None:
        """Count one batch of this process; `to_all` gathers rows for the metrics that cannot be added up."""
        self.num_batches += 1
        if self._summed:
            own_predictions, own_labels = predictions, labels
            if self.without_repeats is not None:
                own_predictions, own_labels = self.without_repeats((predictions, labels))
            if isinstance(own_predictions, DeferredLogits):
                own_predictions = self._count_in_chunks(own_predictions, own_labels)
            for metric in self._summed.values() if own_predictions is not None else ():
                if self.labels_are_shifted and getattr(metric, "shift_labels", False) is None:
                    metric.update(*shifted(own_predictions, own_labels))
                elif isinstance(metric, StreamingMetric) or find_batch_size(own_predictions) != 0:
                    metric.update(own_predictions, own_labels)  # others need not take a batch of repeats only
        if self._gathered:
            predictions, labels = to_all(predictions), to_all(labels)
            for metric in self._gathered.values():
                if hasattr(metric, "update"):
                    metric.update(predictions, labels)
                else:
                    metric.add_batch(predictions=nested_numpify(predictions), references=nested_numpify(labels))

    @torch.no_grad()
    def _count_in_chunks(self, logits: DeferredLogits, labels: Nested) -> torch.Tensor | None:
        """Count the labels of a batch whose logits are computed a chunk of rows at a time: None. The logits themselves
        where a metric needs them.
        """
        counts = all(map(counts_labels, self.metrics.values())) and isinstance(labels, torch.Tensor)
        if not counts or logits.computed is not None:
            return logits.materialized()
        of_shift: dict[bool, list[StreamingMetric]] = {}
        for metric in self._summed.values():
            shifts = self.labels_are_shifted if metric.shift_labels is None else bool(metric.shift_labels)
            of_shift.setdefault(shifts, []).append(metric)
        for shifts, metrics in of_shift.items():
            rows, targets = shifted(logits, labels) if shifts else (logits, labels)
            if rows.shape[:-1] != targets.shape:
                return logits.materialized()  # for the metric to refuse
            # Elsewhere than on a CPU the host would wait for their number.
            mask = targets != IGNORE_INDEX if targets.is_cpu else None
            targets, chosen, start = targets.flatten() if mask is None else targets[mask], rows.of_rows(mask), 0
            losses = chosen.losses(targets)
            if losses is not None:  # of which the model's loss is the mean
                for metric in filter(measures_losses, metrics):
                    metric._add(Perplexity.sums_of(losses, targets))
                metrics = [metric for metric in metrics if not measures_losses(metric)]
                if not metrics:
                    continue
            none = torch.empty(0, logits.shape[-1], device=targets.device)
            for part in chosen.chunks() if len(targets) else [none]:
                for metric in metrics:
                    metric._add(metric.measure(part, targets[start : start + len(part)]))
                start += len(part)
                del part  # before the next
        return None

    def compute(self) -> dict[str, Any]:
        """The metrics of all batches, by name; empty where no batch had predictions and labels."""
        if self.num_batches == 0:
            return {}
        results: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            ours = isinstance(metric, StreamingMetric)
            value = metric.compute(self.sum_over_processes) if ours else metric.compute()
            for key, number in _numbers(name, value):
                if key in results:
                    raise ValueError(f"compute_metrics gives {key!r} twice. Pass a dict that names each metric.")
                results[key] = number
        return results


def shifted(predictions: Any, labels: Any) -> tuple[Any, Any]:
    """Predictions over the labels they are for, where position t predicts label t + 1; unchanged if no sequences."""
    both = isinstance(predictions, torch.Tensor) and isinstance(labels, torch.Tensor)
    if both and labels.ndim >= 2 and predictions.shape[:2] == labels.shape[:2]:
        return predictions[:, :-1], labels[:, 1:]
    return predictions, labels


def named_metrics(metrics: Any) -> dict[str, Any]:
    """Every metric by its name: the key of a dict, else its own, else that of its class in snake case.

    A collection, which names its results itself, has the empty name where it was not given one.
    """
    if isinstance(metrics, dict):
        pairs = list(metrics.items())
    else:
        each = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
        pairs = [(_name_of(metric), metric) for metric in each]
    named: dict[str, Any] = {}
    for name, metric in pairs:
        if isinstance(metric, (dict, list, tuple)) or not is_streaming(metric):
            raise TypeError(
                f"compute_metrics holds {metric!r}, which is no streaming metric: it needs the methods update, compute "
                "and reset. A function of all predictions is passed alone: compute_metrics=function."
            )
        if name in named:
            raise ValueError(
                f"compute_metrics has two metrics named {name!r}. Pass a dict that names each, or name= to one of them."
            )
        named[name] = metric
    return named


def _name_of(metric: Any) -> str:
    if is_instance_of(metric, "torchmetrics", "MetricCollection"):
        return ""
    name = getattr(metric, "name", None)
    if isinstance(name, str) and name:
        return name
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(metric).__name__)
    return words.lower()


def _numbers(name: str, value: Any) -> list[tuple[str, Any]]:
    """What a metric computed as pairs of key and number: a number, a dict of them, or one per class."""
    if isinstance(value, Mapping):
        keys = ((f"{name}_{key}" if name and key != name else str(key), number) for key, number in value.items())
        return [pair for key, number in keys for pair in _numbers(key, number)]
    if hasattr(value, "ndim") and value.ndim == 1 and len(value) > 1:
        return [(f"{name}_{index}", number) for index, number in enumerate(value)]
    if getattr(value, "ndim", 0) > 1:
        raise TypeError(
            f"The metric {name!r} computed a table of shape {tuple(value.shape)}, which cannot be logged. Choose an "
            "average in the metric, or compute it in a function passed as compute_metrics."
        )
    return [(name, value)]


def _is_torchmetrics(metric: Any) -> bool:
    return is_instance_of(metric, "torchmetrics", "Metric", "MetricCollection")


def _adds_up(metric: Any) -> bool:
    return isinstance(metric, StreamingMetric) or _is_torchmetrics(metric)
