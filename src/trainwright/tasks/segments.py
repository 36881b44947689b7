"""Semantic segmentation: masks of class numbers, and intersection over union.

Owns: preparing an image with its mask, `mean_iou`. Leaves to others: reading (`images.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from trainwright.tasks.images import pixels

IGNORED = 255  # pixels that belong to no class


def prepared(
    processor: Any, image: Any, mask: Any, size: tuple[int, int], *, reduce_labels: bool = False, flip: bool = False
) -> dict[str, Any]:
    """{"pixel_values": (channels, height, width), "labels": int64 (height, width)} at `size`, mirrored where `flip`.

    reduce_labels: class 0 is the background that does not count, and the others move down by one.
    """
    image = image.resize((size[1], size[0]), resample=2)
    mask = mask.resize((size[1], size[0]), resample=0)  # nearest: a mean of two classes is a third
    if flip:
        image, mask = image.transpose(0), mask.transpose(0)
    labels = np.array(mask, dtype=np.int64)
    if reduce_labels:
        labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
    return {"pixel_values": pixels(processor, image), "labels": torch.from_numpy(labels)}


def largest_class(mask: Any) -> int:
    """The largest number in a mask but 255; -1 for a mask without classes."""
    values = np.unique(np.array(mask))
    values = values[values != IGNORED]
    return int(values[-1]) if len(values) else -1


def best_classes(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics`: (batch, classes, h, w) to the class of each pixel of `labels` (batch, H, W)."""
    first = logits[0] if isinstance(logits, tuple) else logits
    upsampled = torch.nn.functional.interpolate(first, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return upsampled.argmax(1)


def mean_iou(names: Sequence[str]) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics`: mean intersection over union, mean and overall accuracy, and the first for each class."""

    def compute(prediction: Any) -> dict[str, float]:
        counts = prediction.label_ids != IGNORED
        truth, chosen = prediction.label_ids[counts], prediction.predictions[counts]
        size = len(names)
        table = np.bincount(truth * size + chosen, minlength=size * size).reshape(size, size)  # (truth, predicted)
        hits, is_there, said = np.diag(table), table.sum(1), table.sum(0)
        occurs = (is_there + said) > 0
        iou = hits[occurs] / (is_there + said - hits)[occurs]
        accuracy = hits[is_there > 0] / is_there[is_there > 0]
        result = {
            "mean_iou": float(iou.mean()),
            "mean_accuracy": float(accuracy.mean()),
            "overall_accuracy": float(hits.sum() / max(1, table.sum())),
        }
        return result | {
            f"iou_{names[number]}": float(value) for number, value in zip(np.flatnonzero(occurs).tolist(), iou)
        }

    return compute
