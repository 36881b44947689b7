"""Predictions and labels of every shape are bitwise what the reference returns: ragged, nested, half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

IGNORED = -100
Outputs = dict[str, Any]


def narrow(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


# What the model returns beside its loss, made of logits (batch, seq, 3) whose width differs from batch to batch.
KINDS: dict[str, Any] = {
    "ragged logits": lambda logits: {"logits": logits},
    "two outputs": lambda logits: {"logits": logits, "first": logits[:, 0]},
    "token classes": lambda logits: {"logits": narrow(logits)},
    "one number a sample": lambda logits: {"logits": logits.sum((1, 2))},
    "a scalar a batch": lambda logits: {"logits": logits.sum()},
    "four dimensions": lambda logits: {"logits": logits.unsqueeze(-1).expand(-1, -1, -1, 2)},
    "bfloat16": lambda logits: {"logits": logits.bfloat16()},
    "float16": lambda logits: {"logits": logits.half()},
    "double": lambda logits: {"logits": logits.double()},
    "booleans": lambda logits: {"logits": (logits > 0).all(1)},  # of one width; ragged ones: test_differences.py
    "a tuple in a dict": lambda logits: {"logits": logits, "layers": (logits[:, 0], narrow(logits))},
    "a list in a dict": lambda logits: {"logits": logits, "layers": [logits + 1, [logits.bfloat16()]]},
    "a dict in a dict": lambda logits: {"logits": {"a": logits, "b": narrow(logits)}, "x": (logits.bfloat16(),)},
    "bfloat16 beside float32": lambda logits: {"logits": logits.bfloat16(), "exact": logits},
    "a slice": lambda logits: {"logits": logits[:, :1]},
    "a transposed view": lambda logits: {"logits": logits[:, :1].transpose(1, 2)},
}


class Shaper(nn.Module):
    """Logits for each token, in the form of a kind; one or two columns of labels."""

    main_input_name = "x"

    def __init__(self, kind: str, as_tuple: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(32, 3)
        self.kind, self.as_tuple = kind, as_tuple

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None, other_labels: torch.Tensor | None = None
    ) -> Any:
        logits = self.embedding(x)
        outputs = KINDS[self.kind](logits)
        if labels is not None:
            loss = logits.mean() + labels.float().mean() / 7
            outputs = {"loss": loss if other_labels is None else loss + other_labels.mean(), **outputs}
        return tuple(outputs.values()) if self.as_tuple else outputs


def data(labels: str, num_samples: int = 11) -> list[dict[str, torch.Tensor]]:
    """Samples 2 to 8 tokens long; `labels`: "one" column, as long as the tokens, "two", or "none"."""
    generator = torch.Generator().manual_seed(4)
    samples = []
    for index in range(num_samples):
        x = torch.randint(1, 32, (2 + (index * 3) % 7,), generator=generator)
        columns = {"labels": x % 5, "other_labels": torch.randn(2, generator=generator)}
        names = {"one": ["labels"], "two": ["labels", "other_labels"], "none": []}[labels]
        samples.append({"x": x, **{name: columns[name] for name in names}})
    return samples


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {}
    for name in samples[0]:
        rows, value = [sample[name] for sample in samples], IGNORED if name == "labels" else 0
        batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)  # (batch, length)
    return batch


def assert_bitwise(left: Any, right: Any) -> None:
    """Equal in nesting, dtype, shape and every byte."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_bitwise(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_bitwise(one, other)
    elif left is not None:
        assert left.dtype == right.dtype and left.shape == right.shape
        assert np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()


def given_to_metrics(columns: Any, column: str, kind: str, labels: str, as_tuple: bool, **options: Any) -> Any:
    """(predictions, labels) that `compute_metrics` saw in evaluate(), then what predict() returned."""
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions, prediction.label_ids))
        return {}

    given = {"model": Shaper(kind, as_tuple), "data_collator": collate, "compute_metrics": metrics}
    names = [name for name in data(labels)[0] if "labels" in name] or ["labels"]
    trainer = columns.trainer(
        column, "regression", given={**given, "eval_dataset": data(labels)},
        per_device_eval_batch_size=3, label_names=names, **options,
    )  # fmt: skip
    trainer.evaluate()
    output = trainer.predict(data(labels))
    return [*seen, output.predictions, output.label_ids]


@pytest.mark.parametrize("options", [{}, {"eval_accumulation_steps": 2}], ids=["", "moved every second batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_every_form_are_bitwise_the_same(columns: Any, kind: str, options: dict[str, Any]) -> None:
    ours, theirs = (
        given_to_metrics(columns, column, kind, "one", False, **options) for column in ("ours", "reference")
    )
    assert_bitwise(ours, theirs)
    assert len(ours) == 4  # evaluate and predict called compute_metrics, and predict returned two things


@pytest.mark.parametrize("as_tuple", [False, True], ids=["dict", "tuple"])
@pytest.mark.parametrize("labels", ["one", "two", "none"])
def test_columns_of_labels_are_bitwise_the_same(columns: Any, labels: str, as_tuple: bool) -> None:
    ours, theirs = (
        given_to_metrics(columns, column, "two outputs", labels, as_tuple) for column in ("ours", "reference")
    )
    assert_bitwise(ours, theirs)
    assert isinstance(ours[-1], tuple) == (labels == "two")


@pytest.mark.parametrize("kind", ["ragged logits", "a list in a dict", "bfloat16", "one number a sample"])
def test_rows_beyond_the_memory_budget_are_bitwise_the_same(columns: Any, kind: str) -> None:
    ours = given_to_metrics(columns, "ours", kind, "one", False, eval_memory_budget_gib=1e-8)
    theirs = given_to_metrics(columns, "reference", kind, "one", False)

    def plain(values: Any) -> Any:
        if isinstance(values, (list, tuple)):
            return type(values)(plain(value) for value in values)
        if isinstance(values, dict):
            return {key: plain(value) for key, value in values.items()}
        assert isinstance(values, np.memmap)
        return np.asarray(values)

    assert_bitwise(plain(ours), theirs)
