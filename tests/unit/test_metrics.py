"""Streaming metrics equal scikit-learn's over all predictions, batch by batch, without a read from the device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainwright.metrics import AUROC, F1, Accuracy, Mean, Perplexity, StreamingMetric, Sum, TopK

sklearn = pytest.importorskip("sklearn.metrics")
NUM_SAMPLES, NUM_CLASSES, IGNORED = 500, 7, -100


def data(num_classes: int = NUM_CLASSES, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (samples, classes) that know something of the labels (samples,), of which every ninth is ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (NUM_SAMPLES,), generator=generator)
    logits = torch.randn(NUM_SAMPLES, num_classes, generator=generator)
    logits[torch.arange(NUM_SAMPLES), labels] += 1.0
    labels[::9] = IGNORED
    return logits, labels


LOGITS, LABELS = data()
BINARY_LOGITS, BINARY_LABELS = data(2)


def kept(values: torch.Tensor, labels: torch.Tensor) -> Any:
    """The rows whose label is not ignored, for scikit-learn."""
    return values[labels != IGNORED].numpy()


def streamed(metric: StreamingMetric, predictions: torch.Tensor, labels: Any, batch_size: int = 64) -> float:
    for start in range(0, len(predictions), batch_size):
        rows = slice(start, start + batch_size)
        metric.update(predictions[rows], None if labels is None else labels[rows])
    return metric.compute()


def f1(average: str) -> float:
    return float(sklearn.f1_score(kept(LABELS, LABELS), kept(LOGITS.argmax(-1), LABELS), average=average))


def test_accuracy_is_that_of_scikit_learn() -> None:
    expected = sklearn.accuracy_score(kept(LABELS, LABELS), kept(LOGITS.argmax(-1), LABELS))
    assert streamed(Accuracy(), LOGITS, LABELS) == expected
    assert streamed(Accuracy(), LOGITS.argmax(-1), LABELS) == expected  # class indices


def test_accuracy_of_one_number_per_label_needs_a_threshold() -> None:
    scores = BINARY_LOGITS[:, 1] - BINARY_LOGITS[:, 0]
    expected = sklearn.accuracy_score(kept(BINARY_LABELS, BINARY_LABELS), kept(scores > 0, BINARY_LABELS))
    assert streamed(Accuracy(threshold=0.0), scores, BINARY_LABELS) == expected
    assert streamed(Accuracy(threshold=0.0), scores.unsqueeze(-1), BINARY_LABELS) == expected
    with pytest.raises(ValueError, match=r"threshold=0\.0 for logits"):
        Accuracy().update(scores, BINARY_LABELS)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_is_that_of_scikit_learn(k: int) -> None:
    expected = sklearn.top_k_accuracy_score(
        kept(LABELS, LABELS), kept(LOGITS, LABELS), k=k, labels=list(range(NUM_CLASSES))
    )
    assert streamed(TopK(k), LOGITS, LABELS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
def test_f1_is_that_of_scikit_learn(average: str) -> None:
    assert streamed(F1(average), LOGITS, LABELS) == pytest.approx(f1(average), abs=1e-12)


def test_f1_over_classes_that_never_occur_is_that_of_scikit_learn() -> None:
    labels, predicted = torch.tensor([0, 0, 2, 2]), torch.tensor([0, 2, 2, 4])
    expected = sklearn.f1_score(labels.numpy(), predicted.numpy(), average="macro")
    assert streamed(F1(num_classes=9), predicted, labels) == pytest.approx(expected, abs=1e-12)


def test_binary_f1_is_that_of_scikit_learn() -> None:
    predicted = BINARY_LOGITS.argmax(-1)
    expected = sklearn.f1_score(kept(BINARY_LABELS, BINARY_LABELS), kept(predicted, BINARY_LABELS))
    assert streamed(F1("binary"), BINARY_LOGITS, BINARY_LABELS) == pytest.approx(expected, abs=1e-12)
    scores = BINARY_LOGITS[:, 1] - BINARY_LOGITS[:, 0]
    assert streamed(F1("binary", threshold=0.0), scores, BINARY_LABELS) == pytest.approx(expected, abs=1e-12)
    assert streamed(F1("binary"), torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)) == 0.0


def test_perplexity_is_exp_of_the_log_loss_of_scikit_learn() -> None:
    probabilities = kept(LOGITS.double().softmax(-1), LABELS)
    log_loss = sklearn.log_loss(kept(LABELS, LABELS), probabilities, labels=list(range(NUM_CLASSES)))
    assert streamed(Perplexity(), LOGITS, LABELS) == pytest.approx(math.exp(log_loss), rel=1e-6)
    assert streamed(Perplexity(), 1e6 * torch.eye(2), torch.tensor([1, 0])) == math.inf


def shared_bins(bins: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """The share of pairs of a positive and a negative that are in one bin."""
    positive, negative = np.bincount(bins[labels == 1], minlength=9999), np.bincount(bins[labels == 0], minlength=9999)
    return float((positive * negative).sum() / (positive.sum() * negative.sum()))


@pytest.mark.parametrize("num_bins", [8, 64, 4096])
def test_auroc_of_probabilities_is_that_of_scikit_learn_over_the_bins_and_near_the_exact_one(num_bins: int) -> None:
    probabilities, labels = BINARY_LOGITS.softmax(-1), kept(BINARY_LABELS, BINARY_LABELS)
    bins = np.minimum((kept(probabilities[:, 1], BINARY_LABELS) * np.float32(num_bins)).astype(int), num_bins - 1)
    actual = streamed(AUROC(num_bins, from_logits=False), probabilities, BINARY_LABELS)
    assert actual == pytest.approx(sklearn.roc_auc_score(labels, bins), abs=1e-12)
    exact = sklearn.roc_auc_score(labels, kept(probabilities[:, 1], BINARY_LABELS))
    assert abs(actual - exact) <= shared_bins(bins, labels) / 2 + 1e-12
    assert streamed(AUROC(num_bins, from_logits=False), probabilities[:, 1], BINARY_LABELS) == actual


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_auroc_of_logits_is_near_the_exact_one_also_where_a_sigmoid_would_saturate(scale: float) -> None:
    exact = sklearn.roc_auc_score(
        kept(BINARY_LABELS, BINARY_LABELS), kept(BINARY_LOGITS[:, 1] - BINARY_LOGITS[:, 0], BINARY_LABELS)
    )
    for logits in (BINARY_LOGITS, BINARY_LOGITS[:, 1] - BINARY_LOGITS[:, 0]):
        assert streamed(AUROC(), scale * logits, BINARY_LABELS) == pytest.approx(exact, abs=5e-3)


def test_auroc_of_several_classes_is_the_mean_of_one_against_the_rest() -> None:
    probabilities = LOGITS.double().softmax(-1)
    expected = sklearn.roc_auc_score(
        kept(LABELS, LABELS), kept(probabilities, LABELS), multi_class="ovr", average="macro"
    )
    assert streamed(AUROC(), LOGITS, LABELS) == pytest.approx(expected, abs=2e-3)


def test_auroc_of_scores_that_are_not_a_number_is_not_a_number() -> None:
    scores = BINARY_LOGITS.clone()
    scores[1] = math.nan
    assert math.isnan(streamed(AUROC(), scores, BINARY_LABELS))


def test_mean_and_sum_of_a_function_leave_ignored_labels_out() -> None:
    def errors(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (predictions - labels).abs()

    predicted = LOGITS.argmax(-1).float()
    absolute = np.abs(kept(predicted, LABELS) - kept(LABELS, LABELS)).astype(np.float64)
    assert streamed(Mean(errors), predicted, LABELS) == pytest.approx(absolute.mean(), rel=1e-12)
    assert streamed(Sum(errors), predicted, LABELS) == absolute.sum()
    assert streamed(Mean(), LOGITS, None) == pytest.approx(LOGITS.double().mean().item(), rel=1e-12)


ALL = [
    lambda: Accuracy(), lambda: TopK(3), lambda: Perplexity(), lambda: F1(), lambda: F1("micro"), lambda: AUROC(64),
    lambda: Mean(lambda predictions, labels: predictions.argmax(-1) - labels),
]  # fmt: skip


@pytest.mark.parametrize("make", ALL)
def test_a_metric_does_not_depend_on_the_batches_and_begins_anew_after_a_reset(make: Any) -> None:
    metric = make()
    whole = streamed(metric, LOGITS, LABELS, batch_size=NUM_SAMPLES)
    metric.reset()
    assert streamed(metric, LOGITS, LABELS, batch_size=7) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("make", ALL)
def test_two_halves_merge_and_sum_to_the_whole(make: Any) -> None:
    whole, halves = make(), [make(), make()]
    streamed(whole, LOGITS, LABELS)
    for half, rows in zip(halves, (slice(0, 200), slice(200, None))):
        streamed(half, LOGITS[rows], LABELS[rows])
    other = {id(value): halves[1]._sums[key] for key, value in halves[0]._sums.items()}
    summed = halves[0].compute(sum_over_processes=lambda value: value + other[id(value)])
    assert summed == pytest.approx(whole.compute(), rel=1e-12)
    halves[0].merge(halves[1])
    assert halves[0].compute() == summed


@pytest.mark.parametrize("make", ALL)
def test_a_batch_without_rows_changes_nothing(make: Any) -> None:
    metric = make()
    metric.update(LOGITS[:0], LABELS[:0])  # a process whose last batch holds repeated samples only
    whole = streamed(make(), LOGITS, LABELS)
    assert streamed(metric, LOGITS, LABELS) == whole


@pytest.mark.parametrize("make", ALL)
def test_what_is_held_does_not_grow_with_the_batches(make: Any) -> None:
    metric, held = make(), []
    for batch in range(20):
        metric.update(LOGITS[batch * 20 : batch * 20 + 20], LABELS[batch * 20 : batch * 20 + 20])
        held.append({key: (value.shape, value.untyped_storage().nbytes()) for key, value in metric._sums.items()})
    assert all(sizes == held[0] for sizes in held)


class Reads(TorchDispatchMode):
    """Counts the operators that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "bincount", "index.Tensor")
        if any(name in str(func) for name in waiting):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", ALL)
def test_an_update_does_not_wait_for_the_device(make: Any) -> None:
    metric = make()
    with Reads() as reads:
        metric.update(LOGITS, LABELS)
        metric.update(LOGITS, LABELS)
    assert reads.names == []


@pytest.mark.parametrize("make", ALL)
def test_arrays_and_half_precision_are_taken(make: Any) -> None:
    from_arrays, from_tensors, from_half = make(), make(), make()
    from_arrays.update(LOGITS.numpy(), LABELS.numpy())
    from_tensors.update(LOGITS, LABELS)
    assert from_arrays.compute() == from_tensors.compute()
    from_half.update(LOGITS.bfloat16(), LABELS)
    assert from_half.compute() == pytest.approx(from_tensors.compute(), rel=0.1, abs=0.05)


def test_labels_of_every_position_are_counted_and_shifted_where_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 9, 4, generator=generator), torch.randint(0, 4, (6, 9), generator=generator)
    labels[:, 5:7] = IGNORED
    shifted = Accuracy(shift_labels=True)
    shifted.update(logits, labels)
    predicted, targets = logits[:, :-1].argmax(-1), labels[:, 1:]
    assert shifted.compute() == (predicted == targets)[targets != IGNORED].double().mean().item()


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: TopK(0), ValueError, "k=0"),
        (lambda: TopK(9).update(LOGITS, LABELS), ValueError, "more than the 7 classes"),
        (lambda: F1("marco"), ValueError, "Did you mean 'macro'"),
        (lambda: F1().update(LABELS, LABELS), ValueError, "num_classes"),
        (lambda: AUROC(num_bins=1), ValueError, "num_bins=1"),
        (lambda: Perplexity().update(LOGITS[:, 0], LABELS), ValueError, "needs logits of shape"),
        (lambda: Accuracy().update((LOGITS, LOGITS), LABELS), ValueError, "tuple of 2"),
        (lambda: Accuracy().compute(), ValueError, "before any update"),
        (lambda: streamed(F1(num_classes=3), LABELS, LABELS), ValueError, "outside the classes"),
        (lambda: streamed(TopK(2), LOGITS[:, :3], LABELS), ValueError, "outside the classes"),
        (lambda: streamed(AUROC(), LOGITS[:, :2], LABELS), ValueError, "outside the classes"),
        (lambda: StreamingMetric().update(LOGITS, LABELS), NotImplementedError, "must define measure"),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_an_error_that_says_why(act: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        act()


def test_nothing_but_ignored_labels_is_not_a_number() -> None:
    assert math.isnan(streamed(Accuracy(), LOGITS, torch.full_like(LABELS, IGNORED)))
