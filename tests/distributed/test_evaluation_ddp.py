"""Two gloo processes evaluate to what one does: sorted by length, streamed, and beyond the memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

NUM_SAMPLES, NUM_CLASSES, IGNORED = 21, 4, -100  # of two processes and batches of 2, the last is partly repeated


class Tagger(nn.Module):
    """A class for each token, from the token alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, NUM_CLASSES)
        self.num_positions = 0

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.num_positions += input_ids.numel()
        logits = self.embedding(input_ids)  # (batch, seq, classes)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return {"loss": loss, "logits": logits}


def samples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (NUM_SAMPLES,), generator=generator)
    rows = [torch.randint(1, 50, (int(length),), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row * 7 % NUM_CLASSES} for row in rows]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED),
    }


class Rows:
    """Any object with update, compute and reset: it cannot be added up, so every process gives it all rows."""

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        self.num_rows += len(labels)

    def compute(self) -> int:
        return self.num_rows

    def reset(self) -> None:
        self.num_rows = 0


def streamed_metrics() -> dict[str, Any]:
    from trainwright.metrics import AUROC, F1, Accuracy, Perplexity, Sum

    metrics = {
        "accuracy": Accuracy(), "perplexity": Perplexity(), "f1": F1(), "auroc": AUROC(64), "rows": Rows(),
        "labels": Sum(lambda predictions, labels: labels),
    }  # fmt: skip
    try:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores
    except ImportError:
        return metrics
    options = {"num_classes": NUM_CLASSES, "average": "micro", "ignore_index": IGNORED}
    of_tokens = {"accuracy_tm": MulticlassAccuracy(**options), "counts_tm": MulticlassStatScores(**options)}
    for metric in of_tokens.values():  # it wants the classes in dimension 1
        metric.update = lambda logits, labels, update=metric.update: update(logits.argmax(-1), labels)
    return {**metrics, **of_tokens}


class OfEachBatch:
    """Metrics that are called with each batch and its inputs."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, int]:
        for name, values in prediction.inputs.items():
            self.rows[name] = self.rows.get(name, 0) + len(values)
        return self.rows


class Detector(nn.Module):
    """For each image a score, as many boxes as it has, and a mask as wide as the widest image of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, pixels: torch.Tensor, labels: Any = None, parts: Any = None) -> dict[str, Any]:
        sizes = [1 + int(row[0]) % 3 for row in pixels]
        outputs: dict[str, Any] = {
            "scores": pixels[:, :1] * self.weight,
            "boxes": [
                {"boxes": row.repeat(size, 1), "name": f"image {int(row[0])}"} for row, size in zip(pixels, sizes)
            ],
            "masks": pixels[:, : max(sizes)] >= 0,
            "tokens": pixels[:, : max(sizes)].long(),
        }
        if labels is None:
            return outputs
        return {"loss": self.weight * torch.stack([label["boxes"].mean() for label in labels]).mean(), **outputs}


def images() -> list[dict[str, Any]]:
    rows = [torch.tensor([float(index), 0.0, 1.0, 2.0]) for index in range(NUM_SAMPLES)]
    return [
        {
            "pixels": row,
            "labels": {"boxes": row.repeat(1 + index % 3, 1), "id": torch.tensor([index])},
            "parts": row[: 1 + index % 4],
        }
        for index, row in enumerate(rows)
    ]


def collate_images(rows: list[dict[str, Any]]) -> dict[str, Any]:
    lists = {name: [row[name] for row in rows] for name in ("labels", "parts")}
    return {"pixels": torch.stack([row["pixels"] for row in rows]), **lists}


class Boxes:
    """A metric that is given lists of dicts, as detection metrics are; it cannot be added up."""

    def update(self, predictions: Any, labels: Any) -> None:
        self.found.append((len(predictions[1]), len(labels[0])))

    def compute(self) -> dict[str, int]:
        return {"predictions": sum(n for n, _ in self.found), "labels": sum(n for _, n in self.found)}

    def reset(self) -> None:
        self.found: list[tuple[int, int]] = []


def scenarios(folder: Path) -> dict[str, Any]:
    from trainwright import Trainer, TrainingArguments

    def trainer(compute_metrics: Any = None, **arguments: Any) -> Any:
        args = TrainingArguments(
            str(folder / "out"),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            per_device_eval_batch_size=2,
            **arguments,
        )
        return Trainer(Tagger(), args, data_collator=collate, compute_metrics=compute_metrics)

    found: dict[str, Any] = {}
    for order in ("sequential", "group_by_length", "length_sorted"):
        for budget in (None, 1e-7):
            one = trainer(eval_sampling_strategy=order, eval_memory_budget_gib=budget)
            output = one.predict(samples())
            # Behind a sample's tokens stand the logits of the padding, as far as its batch was padded.
            logits = np.where(output.label_ids[..., None] == IGNORED, 0, output.predictions)
            found[f"{order} {budget}"] = (
                logits, np.array(output.label_ids), output.metrics["test_loss"],
                one.model.num_positions, isinstance(output.label_ids, np.memmap),
            )  # fmt: skip
    metrics = trainer(streamed_metrics(), eval_sampling_strategy="length_sorted").evaluate(samples())
    found["streamed"] = {k: v for k, v in metrics.items() if not k.endswith(("runtime", "per_second"))}
    smoothed = {"batch_eval_metrics": True, "include_for_metrics": ["inputs"], "label_smoothing_factor": 0.1}
    found["smoothed"] = trainer(OfEachBatch(), **smoothed).evaluate(samples())
    output = trainer(streamed_metrics(), eval_memory_budget_gib=1e-7).predict(samples())
    for order in ("sequential", "length_sorted"):
        args = TrainingArguments(
            str(folder / "out"), report_to="none", use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=2,
            remove_unused_columns=False, label_names=["labels", "parts"], eval_sampling_strategy=order,
        )  # fmt: skip
        detecting = Trainer(Detector(), args, data_collator=collate_images, compute_metrics=Boxes())
        detecting._token_padding = lambda: 7
        detecting._length_input_name = lambda: "ids"
        found_here = detecting.predict([{**row, "ids": range((index * 5) % 7)} for index, row in enumerate(images())])
        found[f"detected {order}"] = found_here.predictions, found_here.label_ids, found_here.metrics
    found["streamed beyond the budget"] = np.array(output.predictions), output.label_ids, output.metrics
    return found


@pytest.fixture(scope="module")
def runs(one: Any, two: list[Any]) -> list[dict[str, Any]]:
    """What one process found, then what each of two found."""
    return [one, *two]


def test_rows_come_back_in_the_order_of_the_data_set_whatever_the_order_and_the_budget(
    runs: list[dict[str, Any]],
) -> None:
    logits, labels, loss, _, _ = runs[0]["sequential None"]
    for run in runs:
        for name, found in run.items():
            if name.startswith(("streamed", "smoothed", "detected")):
                continue
            assert np.array_equal(found[0], logits) and np.array_equal(found[1], labels), name
            assert found[2] == pytest.approx(loss, rel=1e-6)  # that of the samples, none of them twice
            assert found[4] == name.endswith("1e-07")


def test_sorted_processes_compute_less_padding(runs: list[dict[str, Any]]) -> None:
    computed = {name: runs[1][name][3] + runs[2][name][3] for name in ("sequential None", "length_sorted None")}
    assert computed["length_sorted None"] < computed["sequential None"]  # although it repeats the longest to fill up


def test_streamed_metrics_are_summed_over_processes_without_the_repeated_samples(runs: list[dict[str, Any]]) -> None:
    alone, *both = (run["streamed"] for run in runs)
    assert alone["eval_rows"] == NUM_SAMPLES
    for found in both:
        assert found.keys() == alone.keys()
        assert found.pop("eval_loss") == pytest.approx(alone["eval_loss"], rel=1e-6)
        assert found == pytest.approx({key: value for key, value in alone.items() if key != "eval_loss"}, rel=1e-9)


def test_rows_beyond_the_budget_and_streamed_metrics_of_the_same_samples_go_together(
    runs: list[dict[str, Any]],
) -> None:
    for logits, labels, metrics in (run["streamed beyond the budget"] for run in runs):
        assert isinstance(labels, np.memmap) and np.array_equal(labels, runs[0]["sequential None"][1])
        is_label = labels != IGNORED
        assert metrics["test_accuracy"] == pytest.approx((logits.argmax(-1) == labels)[is_label].mean(), rel=1e-9)
        assert metrics["test_rows"] == NUM_SAMPLES


def test_a_loss_that_takes_the_labels_out_leaves_them_to_be_counted_and_shown(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        assert run["smoothed"]["eval_loss"] == pytest.approx(runs[0]["smoothed"]["eval_loss"], rel=1e-6)
        assert {run["smoothed"][f"eval_{name}"] for name in ("input_ids", "labels")} == {NUM_SAMPLES}


@pytest.mark.parametrize("order", ["sequential", "length_sorted"])
def test_entries_of_single_samples_come_back_once_each_and_in_order(runs: list[dict[str, Any]], order: str) -> None:
    for run in runs:
        (scores, boxes, _, _), (labels, parts), metrics = run[f"detected {order}"]
        assert scores[:, 0].tolist() == list(range(NUM_SAMPLES))
        assert len(boxes) == len(labels) == len(parts) == NUM_SAMPLES
        for index, sample in enumerate(images()):
            expected = sample["labels"]["boxes"].tolist()
            assert labels[index]["boxes"].tolist() == boxes[index]["boxes"].tolist() == expected
            assert labels[index]["id"].tolist() == [index] and boxes[index]["name"] == f"image {index}"
            assert parts[index].tolist() == sample["parts"].tolist()
        of_samples = [sample["labels"]["boxes"].mean().item() for sample in images()]
        assert (metrics["test_boxes_predictions"], metrics["test_boxes_labels"]) == (NUM_SAMPLES, NUM_SAMPLES)
        if order == "sequential" and run is runs[0]:
            assert metrics["test_loss"] == pytest.approx(sum(of_samples) / NUM_SAMPLES, rel=1e-5)


@pytest.mark.parametrize("order", ["sequential", "length_sorted"])
def test_rows_of_processes_that_differ_in_width_are_padded_with_what_is_no_data(
    runs: list[dict[str, Any]], order: str
) -> None:
    for run in runs:
        _, _, masks, tokens = run[f"detected {order}"][0]
        assert masks.dtype == np.int8 and set(np.unique(masks)) == {1, -100}  # no value is False
        padded = masks == -100
        assert padded.any() and (tokens[padded] == 7).all() and (tokens[:, 0] == np.arange(NUM_SAMPLES)).all()
