"""Metrics that are counted batch by batch and keep no predictions: memory does not grow with the data.

Owns: `StreamingMetric`, which sums what each batch gives, and the common metrics. Leaves to others: calling them in an
evaluation (`evaluation/streaming`). Sums stay on the predictions' device; only `compute` reads them.

    Trainer(..., compute_metrics=[Accuracy(), TopK(5)])

Each metric takes tensors or arrays and leaves out labels of -100. Predictions are logits (..., classes) over labels
(...), or class indices of the labels' shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from trainwright.names import IGNORE_INDEX, closest

Sums = dict[str, torch.Tensor]
SumOverProcesses = Callable[[torch.Tensor], torch.Tensor]


class StreamingMetric:
    """A metric that is a function of sums over samples. Write `measure` and `result` for one of your own.

    name: its key in the metrics. shift_labels: position t predicts label t + 1, as in causal language models; None: in
    a Trainer what its model does, elsewhere no.
    """

    default_name = "metric"

    def __init__(self, name: str | None = None, shift_labels: bool | None = None) -> None:
        self.name = self.default_name if name is None else name
        self.shift_labels = shift_labels
        self._sums: Sums = {}

    def measure(self, predictions: torch.Tensor, labels: Any) -> Sums:
        """What one batch adds: tensors of fixed shapes, on the predictions' device. Must not read them (`.item()`)."""
        raise NotImplementedError(f"{type(self).__name__} must define measure(predictions, labels).")

    def result(self, sums: Sums) -> float:
        """The metric, from the sums of all batches of all processes, on the host."""
        raise NotImplementedError(f"{type(self).__name__} must define result(sums).")

    @torch.no_grad()
    def update(self, predictions: Any, labels: Any = None) -> None:
        """Count one batch. Does not wait for the device. Raises ValueError for shapes that do not fit."""
        if isinstance(predictions, (tuple, list, dict)):
            raise ValueError(
                f"{type(self).__name__} takes one tensor of predictions, but the model returned a "
                f"{type(predictions).__name__} of {len(predictions)}. Choose one in preprocess_logits_for_metrics, or "
                "name the others in ignore_keys."
            )
        predictions = torch.as_tensor(predictions)
        labels = labels if labels is None else torch.as_tensor(labels, device=predictions.device)
        if self.shift_labels:
            predictions, labels = predictions[:, :-1], labels[:, 1:]
        self._add(self.measure(predictions, labels))

    def _add(self, sums: Sums) -> None:
        for key, value in sums.items():
            if key in self._sums:
                self._sums[key] += value
            else:
                self._sums[key] = value.detach().clone()

    def compute(self, sum_over_processes: SumOverProcesses | None = None) -> float:
        """The metric over all batches since `reset`. `sum_over_processes`: adds a tensor up over all processes.

        Raises ValueError where no batch was counted.
        """
        if not self._sums:
            raise ValueError(f"{type(self).__name__}.compute() before any update(): there is nothing to compute from.")
        sums = self._sums
        if sum_over_processes is not None:
            sums = {key: sum_over_processes(value) for key, value in sums.items()}
        return self.result({key: value.cpu() for key, value in sums.items()})

    def merge(self, other: StreamingMetric) -> None:
        """Add what `other`, a metric of the same kind, counted elsewhere."""
        for key, value in other._sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()

    def reset(self) -> None:
        """Forget all batches."""
        self._sums = {}


def counts_labels(metric: Any) -> bool:
    """Whether `metric` counts each label by its logits alone, whatever row it is in: so packs, and parts of a batch,
    may be counted in any order. Not so where a subclass measures or updates otherwise."""
    if not isinstance(metric, StreamingMetric):
        return False
    kind = type(metric)
    return any(kind.measure is one.measure for one in COUNTING_LABELS) and kind.update is StreamingMetric.update


def measures_losses(metric: StreamingMetric) -> bool:
    """Whether `metric` is a sum of the cross-entropies of labels, as `Perplexity` is."""
    return type(metric).measure is Perplexity.measure


def _wide(values: torch.Tensor) -> torch.Tensor:
    """`values` in a type whose sum stays exact enough over any number of batches."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)  # mps has no float64


def _taking_part(labels: torch.Tensor) -> torch.Tensor:
    return labels != IGNORE_INDEX


def _logits_over(predictions: torch.Tensor, labels: torch.Tensor, metric: StreamingMetric) -> None:
    if predictions.shape[:-1] != labels.shape:
        raise ValueError(
            f"{type(metric).__name__} needs logits of shape (..., classes) over labels (...); got "
            f"{tuple(predictions.shape)} over {tuple(labels.shape)}."
        )


def _class_indices(
    predictions: torch.Tensor, labels: torch.Tensor, metric: StreamingMetric, threshold: float | None
) -> torch.Tensor:
    """The predicted class of each label, in the labels' shape."""
    if predictions.shape == labels.shape:
        if not predictions.is_floating_point():
            return predictions.long()
        if threshold is None:
            raise ValueError(
                f"{type(metric).__name__} got one number per label, {tuple(predictions.shape)}, and cannot know from "
                "where on it means class 1: pass threshold=0.0 for logits, threshold=0.5 for probabilities."
            )
        return (predictions > threshold).long()
    if predictions.shape == (*labels.shape, 1) and threshold is not None:
        return (predictions.squeeze(-1) > threshold).long()
    _logits_over(predictions, labels, metric)
    return predictions.argmax(dim=-1)


class Accuracy(StreamingMetric):
    """The share of labels that were predicted. threshold: see `F1`."""

    default_name = "accuracy"

    def __init__(
        self, threshold: float | None = None, *, name: str | None = None, shift_labels: bool | None = None
    ) -> None:
        super().__init__(name, shift_labels)
        self.threshold = threshold

    def measure(self, predictions: torch.Tensor, labels: torch.Tensor) -> Sums:
        taking_part = _taking_part(labels)
        right = (_class_indices(predictions, labels, self, self.threshold) == labels) & taking_part
        return {"right": right.sum(), "labels": taking_part.sum()}

    def result(self, sums: Sums) -> float:
        return _ratio(sums["right"], sums["labels"])


class TopK(StreamingMetric):
    """The share of labels among the `k` largest logits. Equal logits count in the label's favour."""

    def __init__(self, k: int = 5, *, name: str | None = None, shift_labels: bool | None = None) -> None:
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k={k!r} must be a number of classes of at least 1.")
        super().__init__(f"top_{k}_accuracy" if name is None else name, shift_labels)
        self.k = k

    def measure(self, predictions: torch.Tensor, labels: torch.Tensor) -> Sums:
        _logits_over(predictions, labels, self)
        if self.k > predictions.shape[-1]:
            raise ValueError(f"k={self.k} is more than the {predictions.shape[-1]} classes of the logits.")
        taking_part = _taking_part(labels)
        known = taking_part & (labels >= 0) & (labels < predictions.shape[-1])
        of_label = predictions.gather(-1, labels.clamp(0, predictions.shape[-1] - 1).unsqueeze(-1))  # (..., 1)
        num_larger = (predictions > of_label).sum(dim=-1)
        right = (num_larger < self.k) & known
        return {"right": right.sum(), "labels": taking_part.sum(), "unknown": (taking_part & ~known).sum()}

    def result(self, sums: Sums) -> float:
        _check_known(sums, self)
        return _ratio(sums["right"], sums["labels"])


class Perplexity(StreamingMetric):
    """exp of the mean negative log-likelihood of the labels, in nats; infinite where that overflows."""

    default_name = "perplexity"

    def measure(self, predictions: torch.Tensor, labels: torch.Tensor) -> Sums:
        _logits_over(predictions, labels, self)
        losses = torch.nn.functional.cross_entropy(
            predictions.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return self.sums_of(losses, labels)

    @staticmethod
    def sums_of(losses: torch.Tensor, labels: torch.Tensor) -> Sums:
        """As `measure`, where the cross-entropy of each label is known, 0 where it takes no part: (labels,)."""
        return {"loss": _wide(losses).sum(), "labels": _taking_part(labels).sum()}

    def result(self, sums: Sums) -> float:
        mean_loss = _ratio(sums["loss"], sums["labels"])
        try:
            return math.exp(mean_loss)
        except OverflowError:
            return math.inf


class F1(StreamingMetric):
    """The harmonic mean of precision and recall.

    average: "macro", the mean over the classes that are a label or a prediction somewhere; "weighted", that mean
    weighted by labels; "micro", over all predictions together; "binary", that of class 1. num_classes: needed where
    predictions are class indices. threshold: for one number per label, above it is class 1: 0.0 for logits, 0.5 for
    probabilities.
    """

    default_name = "f1"
    AVERAGES = ("macro", "micro", "weighted", "binary")

    def __init__(
        self,
        average: str = "macro",
        num_classes: int | None = None,
        threshold: float | None = None,
        *,
        name: str | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        if average not in self.AVERAGES:
            hint = closest(str(average), self.AVERAGES)
            raise ValueError(f"average={average!r} must be one of {list(self.AVERAGES)}.{hint}")
        super().__init__(name, shift_labels)
        self.average = average
        self.threshold = threshold
        self.num_classes = 2 if num_classes is None and (average == "binary" or threshold is not None) else num_classes

    def measure(self, predictions: torch.Tensor, labels: torch.Tensor) -> Sums:
        predicted = _class_indices(predictions, labels, self, self.threshold)
        num_classes = self.num_classes or (predictions.shape[-1] if predictions.shape != labels.shape else None)
        if num_classes is None:
            raise ValueError('F1 of class indices needs the number of classes: F1("macro", num_classes=...).')
        taking_part = _taking_part(labels)
        known = taking_part & (labels >= 0) & (labels < num_classes) & (predicted >= 0) & (predicted < num_classes)
        predicted, labels = predicted.clamp(0, num_classes - 1), labels.clamp(0, num_classes - 1)
        return {
            "hits": _histogram(labels, known & (predicted == labels), num_classes),
            "predicted": _histogram(predicted, known, num_classes),
            "labels": _histogram(labels, known, num_classes),
            "unknown": (taking_part & ~known).sum(),
        }

    def result(self, sums: Sums) -> float:
        _check_known(sums, self)
        hits, predicted, labels = (sums[key].double() for key in ("hits", "predicted", "labels"))  # (classes,)
        if self.average == "micro":
            hits, predicted, labels = (count.sum(dim=0, keepdim=True) for count in (hits, predicted, labels))
        elif self.average == "binary":
            hits, predicted, labels = (count[1:2] for count in (hits, predicted, labels))
            if predicted + labels == 0:
                return 0.0  # as scikit-learn defines it
        present = predicted + labels > 0
        by_class = 2 * hits[present] / (predicted + labels)[present]
        if self.average == "weighted":
            return _ratio((by_class * labels[present]).sum(), labels.sum())
        return float(by_class.mean())


class AUROC(StreamingMetric):
    """The area under the ROC curve, from counts of scores in `num_bins` bins.

    Predictions are logits (..., classes), or one score per label; from_logits=False: they are probabilities. With more
    than two classes the mean over those of one class against the rest. Two scores in one bin count as equal: the result
    is off by at most half the share of pairs (positive, negative) that share a bin.
    """

    default_name = "auroc"

    def __init__(
        self,
        num_bins: int = 4096,
        from_logits: bool = True,
        *,
        name: str | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        if not isinstance(num_bins, int) or num_bins < 2:
            raise ValueError(f"num_bins={num_bins!r} must be a whole number of at least 2.")
        super().__init__(name, shift_labels)
        self.num_bins = num_bins
        self.from_logits = from_logits

    def measure(self, predictions: torch.Tensor, labels: torch.Tensor) -> Sums:
        scores = self._scores(predictions.float(), labels)  # (labels, classes), or (labels, 1) for two classes
        labels = labels.flatten()
        num_scores = scores.shape[1]
        taking_part = _taking_part(labels)
        known = taking_part & (labels >= 0) & (labels < max(2, num_scores))
        bins = (scores.nan_to_num(0.0) * self.num_bins).long().clamp(0, self.num_bins - 1)
        first_class = 1 if num_scores == 1 else 0
        classes = torch.arange(first_class, first_class + num_scores, device=labels.device)
        is_positive = (labels.unsqueeze(1) == classes).long()
        place = (classes - first_class) * 2 * self.num_bins + is_positive * self.num_bins + bins  # (labels, classes)
        counts = _histogram(place, known.unsqueeze(1).expand_as(place), num_scores * 2 * self.num_bins)
        return {
            "counts": counts.view(num_scores, 2, self.num_bins),
            "unknown": (taking_part & ~known).sum(),
            "not_a_number": (scores.isnan().any(dim=1) & taking_part).sum(),
        }

    def _scores(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scores from 0 to 1 that order the labels as the predictions do."""
        if predictions.shape == labels.shape:
            predictions = predictions.unsqueeze(-1)
        _logits_over(predictions, labels, self)
        predictions = predictions.flatten(0, -2)
        if predictions.shape[1] == 2:
            predictions = predictions[:, 1:] - predictions[:, :1] if self.from_logits else predictions[:, 1:]
        if not self.from_logits:
            return predictions
        if predictions.shape[1] > 1:
            log_p = predictions.log_softmax(dim=1)
            predictions = log_p - torch.log1p(-log_p.exp())
        # Not a sigmoid, whose tails put all confident predictions into one bin; the order is what counts.
        clamped = predictions.clamp(-1e6, 1e6)
        return 0.5 + 0.5 * clamped / (1 + clamped.abs())

    def result(self, sums: Sums) -> float:
        _check_known(sums, self)
        if sums["not_a_number"] > 0:
            return math.nan
        negatives, positives = sums["counts"].double().unbind(dim=1)  # (classes, bins)
        below = negatives.cumsum(dim=1) - negatives
        pairs = positives.sum(dim=1) * negatives.sum(dim=1)
        by_class = (positives * (below + negatives / 2)).sum(dim=1) / pairs
        return float(by_class[pairs > 0].mean())


class Mean(StreamingMetric):
    """The mean of `of(predictions, labels)`, a tensor of any shape; without `of`, of the predictions.

        Mean(lambda predictions, labels: (predictions - labels) ** 2, name="mse")

    Where the values have the shape of integer labels, those of -100 take no part.
    """

    default_name = "mean"

    def __init__(
        self,
        of: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
        *,
        name: str | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        super().__init__(name, shift_labels)
        self.of = of

    def measure(self, predictions: torch.Tensor, labels: Any) -> Sums:
        values = predictions if self.of is None else self.of(predictions, labels)
        if isinstance(labels, torch.Tensor) and labels.shape == values.shape and not labels.is_floating_point():
            taking_part = _taking_part(labels)
            return {"sum": torch.where(taking_part, _wide(values), 0).sum(), "count": taking_part.sum()}
        return {"sum": _wide(values).sum(), "count": torch.tensor(values.numel(), device=values.device)}

    def result(self, sums: Sums) -> float:
        return _ratio(sums["sum"], sums["count"])


class Sum(Mean):
    """The sum of what `Mean` is the mean of."""

    default_name = "sum"

    def result(self, sums: Sums) -> float:
        return float(sums["sum"])


COUNTING_LABELS: tuple[type[StreamingMetric], ...] = (Accuracy, TopK, Perplexity, F1, AUROC)


def _histogram(values: torch.Tensor, counted: torch.Tensor, num_values: int) -> torch.Tensor:
    """How often each of 0 to num_values - 1 is in `values` where `counted`; torch.bincount waits for the device."""
    counts = torch.zeros(num_values, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, values.flatten(), counted.flatten().long())


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> float:
    """NaN where nothing was counted: there is no such number."""
    return float(numerator.double() / denominator.double())


def _check_known(sums: Sums, metric: StreamingMetric) -> None:
    if sums["unknown"] > 0:
        raise ValueError(
            f"{type(metric).__name__}: {int(sums['unknown'])} labels or predictions are outside the classes that it "
            f"counts ({metric.name}). Labels to leave out must be {IGNORE_INDEX}; num_classes= or the width of the "
            "logits says how many classes there are."
        )
