"""Pairs of images and texts: batches, and retrieval recall.

Owns: `PairCollator`, `ContrastiveTrainer`, recall. Leaves to others: the loss (the model's own).
Source: Radford et al. 2021 (CLIP), section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainwright.outputs import EvalLoopOutput
from trainwright.trainer import Trainer

Array = np.ndarray[Any, Any]


class PairCollator:
    """Batches of {"pixel_values", "text"}: images stacked, texts tokenised and padded, `return_loss` for the model."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        texts = [row["text"] for row in rows]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        batch = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return {**batch, "pixel_values": torch.stack([row["pixel_values"] for row in rows]), "return_loss": True}


class ContrastiveTrainer(Trainer):
    """A Trainer whose evaluations add recall: how often an image finds its text among all texts, and a text its image.

    There are no labels, so `compute_metrics` is not called; the outputs are scored here. Texts that are the same count
    as one, whichever row they came from.
    """

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the embeddings (images, texts) as predictions, and recall."""
        kwargs["prediction_loss_only"] = False
        kwargs["ignore_keys"] = ["logits_per_image", "logits_per_text", "text_model_output", "vision_model_output"]
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        texts, images = output.predictions[:2]
        prefix = kwargs.get("metric_key_prefix", "eval")
        scores = {f"{prefix}_{name}": value for name, value in recall(np.asarray(images), np.asarray(texts)).items()}
        return output._replace(metrics={**(output.metrics or {}), **scores})


def recall(images: Array, texts: Array, at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of images whose text is among the `at` nearest of all texts, and the reverse; both (rows, width).

    A text (image) equal to the right one counts as right, so that repeated captions are not misses.
    """
    images = images / np.linalg.norm(images, axis=1, keepdims=True)
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    similarity = images @ texts.T  # (images, texts)
    found: dict[str, float] = {}
    for name, table, others in (("image_to_text", similarity, texts), ("text_to_image", similarity.T, images)):
        own = np.diag(table)
        same = (np.abs(others[:, None] - others[None]).max(-1) < 1e-6).T  # (row, other): equal to the right one
        better = ((table > own[:, None]) & ~same).sum(1)
        found |= {f"{name}_recall_at_{k}": float((better < k).mean()) for k in at if k < len(table)}
    return found
