"""`compute_metrics` as an object that counts batch by batch: the numbers of a function of all predictions, no rows."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainwright.evaluation.buffers import ArrayBuffer
from trainwright.metrics import F1, Accuracy, Mean, Perplexity, StreamingMetric, Sum, TopK

NUM_CLASSES = 4


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(3, NUM_CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.linear(x)  # (batch, classes)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def rows(num_samples: int = 23) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 3, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator)
    labels[::6] = -100
    return [{"x": row, "labels": label} for row, label in zip(x, labels)]


def of_all(prediction: Any) -> dict[str, float]:
    """The same metrics from all predictions at once."""
    logits, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
    logits, labels = logits[labels != -100], labels[labels != -100]
    return {
        "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        "top_2_accuracy": (logits.topk(2).indices == labels[:, None]).any(1).double().mean().item(),
        "perplexity": nn.functional.cross_entropy(logits, labels).exp().item(),
    }


@pytest.fixture
def classify(make_trainer: Any) -> Any:
    def make(compute_metrics: Any, given: dict[str, Any] | None = None, **arguments: Any) -> Any:
        parts = {"model": Classifier(), "train_dataset": rows(), "eval_dataset": rows(), **(given or {})}
        return make_trainer(trainer={**parts, "compute_metrics": compute_metrics}, **arguments)

    return make


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.endswith(("runtime", "per_second"))}


@pytest.mark.parametrize("batch_size", [1, 4, 23])
def test_streamed_metrics_are_those_of_all_predictions(classify: Any, batch_size: int) -> None:
    metrics = [Accuracy(), TopK(2), Perplexity()]
    streamed = untimed(classify(metrics, per_device_eval_batch_size=batch_size).evaluate())
    assert streamed == pytest.approx(untimed(classify(of_all, per_device_eval_batch_size=batch_size).evaluate()))
    assert len(streamed) == 4 and streamed["eval_loss"] == pytest.approx(np.log(streamed["eval_perplexity"]))


def test_a_second_evaluation_begins_anew(classify: Any) -> None:
    trainer = classify({"hits": Accuracy(), "f1": F1()})
    first = untimed(trainer.evaluate())
    assert untimed(trainer.evaluate()) == first and {"eval_hits", "eval_f1", "eval_loss"} == first.keys()


def test_an_evaluation_that_streams_keeps_no_rows_and_predict_returns_them(
    classify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = []
    monkeypatch.setattr(ArrayBuffer, "add", lambda self, leaf, add=ArrayBuffer.add: added.append(1) or add(self, leaf))
    trainer = classify(Accuracy())
    metrics = trainer.evaluate()
    assert added == []
    output = trainer.predict(rows())
    assert output.predictions.shape == (23, NUM_CLASSES) and output.label_ids.shape == (23,)
    assert output.metrics["test_accuracy"] == metrics["eval_accuracy"]
    assert len(classify(Accuracy(), batch_eval_metrics=True).predict(rows()).predictions) == len(rows())


def test_logits_may_be_reduced_before_they_are_counted(classify: Any) -> None:
    trainer = classify(Accuracy(), given={"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)})
    assert trainer.evaluate()["eval_accuracy"] == classify(Accuracy()).evaluate()["eval_accuracy"]


def test_the_best_model_may_be_chosen_by_a_streamed_metric(classify: Any) -> None:
    trainer = classify(
        Accuracy(), max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer.train()
    values = [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line]
    assert len(values) == 4 and trainer.state.best_metric == max(values)


def test_a_metric_name_that_no_metric_has_is_found_before_the_first_step(classify: Any) -> None:
    trainer = classify(
        Accuracy(), eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True,
        metric_for_best_model="acuracy",
    )  # fmt: skip
    with pytest.raises(ValueError, match="Did you mean 'eval_accuracy'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_causal_language_model_is_compared_with_the_next_label(make_trainer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 16, (10, 8), generator=generator)
    data = [{"input_ids": row, "labels": row.clone()} for row in tokens]
    data[0]["labels"][3:6] = -100
    parts = {"model": transformers.GPT2LMHeadModel(config), "train_dataset": data, "eval_dataset": data}
    trainer = make_trainer(trainer={**parts, "compute_metrics": Perplexity()}, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(metrics["eval_loss"]), rel=1e-5)


class Spread(StreamingMetric):
    """The variance of the predictions: a metric of one's own in two methods."""

    default_name = "spread"

    def measure(self, predictions: torch.Tensor, labels: Any) -> dict[str, torch.Tensor]:
        values = predictions.double()
        return {"sum": values.sum(), "squares": (values**2).sum(), "count": (values == values).sum()}

    def result(self, sums: dict[str, torch.Tensor]) -> float:
        return float(sums["squares"] / sums["count"] - (sums["sum"] / sums["count"]) ** 2)


def test_a_metric_of_ones_own_needs_two_methods(classify: Any) -> None:
    trainer = classify([Spread(), Mean(name="centre"), Sum(name="total")])
    metrics = trainer.evaluate()
    predictions = trainer.predict(rows()).predictions.astype(np.float64)
    assert metrics["eval_spread"] == pytest.approx(predictions.var())
    assert metrics["eval_centre"] == pytest.approx(predictions.mean())
    assert metrics["eval_total"] == pytest.approx(predictions.sum())


# ----------------------------------------------------------------------------------------- objects of other makers ----


class Duck:
    """Anything with update, compute and reset."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.count = 0

    def update(self, predictions: Any, labels: Any) -> None:
        assert isinstance(predictions, torch.Tensor) and len(predictions) == len(labels)
        self.calls.append("update")
        self.count += len(predictions)

    def compute(self) -> Any:
        return {"count": self.count, "per_class": np.array([1.0, 2.0])}

    def reset(self) -> None:
        self.calls.append("reset")
        self.count = 0


def test_any_object_with_update_compute_and_reset_is_streamed(classify: Any) -> None:
    duck = Duck()
    metrics = classify({"duck": duck}, per_device_eval_batch_size=10).evaluate()
    assert duck.calls == ["reset", "update", "update", "update"]
    assert (metrics["eval_duck_count"], metrics["eval_duck_per_class_1"]) == (23, 2.0)
    assert classify(Duck()).evaluate()["eval_duck_count"] == 23  # named after its class


def test_an_object_with_add_batch_and_compute_is_given_arrays(classify: Any) -> None:
    class Added:
        name = "added"

        def __init__(self) -> None:
            self.seen: list[int] = []

        def add_batch(self, *, predictions: Any, references: Any) -> None:
            assert type(predictions) is np.ndarray and len(predictions) == len(references)
            self.seen.append(len(references))

        def compute(self) -> dict[str, float]:
            return {"seen": float(sum(self.seen))}

    metric = Added()
    assert classify(metric, per_device_eval_batch_size=10).evaluate()["eval_added_seen"] == 23.0
    assert metric.seen == [10, 10, 3]


def test_a_function_object_with_compute_result_stays_a_function(classify: Any) -> None:
    class Counting:
        def __init__(self) -> None:
            self.num_rows = 0

        def update(self, predictions: Any, labels: Any) -> None:
            raise AssertionError("not called by the loop")

        compute = reset = update

        def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float] | None:
            self.num_rows += len(prediction.label_ids)
            return {"rows": float(self.num_rows)} if compute_result else None

    assert classify(Counting(), batch_eval_metrics=True).evaluate()["eval_rows"] == 23.0


def torchmetrics() -> Any:
    return pytest.importorskip("torchmetrics", reason="pip install torchmetrics to test its metrics")


def test_a_metric_of_torchmetrics_gives_what_it_gives_over_all_predictions(classify: Any) -> None:
    classification = torchmetrics().classification
    make = lambda: classification.MulticlassAccuracy(NUM_CLASSES, average="micro", ignore_index=-100)  # noqa: E731
    trainer = classify(make(), per_device_eval_batch_size=5)
    output, alone = trainer.predict(rows()), make()
    alone.update(torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids))
    assert trainer.evaluate()["eval_multiclass_accuracy"] == pytest.approx(alone.compute().item())
    assert trainer.evaluate()["eval_multiclass_accuracy"] == pytest.approx(
        classify(Accuracy()).evaluate()["eval_accuracy"]
    )


def test_a_collection_of_torchmetrics_names_its_metrics_and_a_dict_puts_names_before_them(classify: Any) -> None:
    library = torchmetrics()
    classification = library.classification
    collection = library.MetricCollection(
        {
            "acc": classification.MulticlassAccuracy(NUM_CLASSES, ignore_index=-100),
            "f1": classification.MulticlassF1Score(NUM_CLASSES, average=None, ignore_index=-100),
        }
    )
    expected = {"eval_acc", *(f"eval_f1_{index}" for index in range(NUM_CLASSES)), "eval_loss"}
    assert untimed(classify(collection).evaluate()).keys() == expected
    assert {"eval_ours", "eval_tm_acc"} <= classify({"ours": Accuracy(), "tm": collection}).evaluate().keys()


# ------------------------------------------------------------------------------------------------------ bad input ----


@pytest.mark.parametrize(
    ("metrics", "error", "words"),
    [
        ([Accuracy(), Accuracy()], ValueError, "two metrics named 'accuracy'"),
        ([Accuracy(), of_all], TypeError, "no streaming metric"),
        ({"a": 3}, TypeError, "must be a function"),
        ({"a": [Accuracy()]}, TypeError, "no streaming metric"),
        (Accuracy, TypeError, "instance"),
    ],
)
def test_what_is_no_metric_is_an_error_at_construction(
    classify: Any, metrics: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        classify(metrics)


def test_inputs_for_a_streaming_metric_are_refused(classify: Any) -> None:
    with pytest.raises(ValueError, match="include_for_metrics"):
        classify(Accuracy(), include_for_metrics=["inputs"])


def test_two_results_of_one_name_are_an_error(classify: Any) -> None:
    class Same(Duck):
        def compute(self) -> Any:
            return {"accuracy": 1.0}

    with pytest.raises(ValueError, match="gives 'accuracy' twice"):
        classify({"accuracy": Accuracy(), "": Same()}).evaluate()


def test_no_library_of_metrics_is_imported(classify: Any) -> None:
    before = set(sys.modules)
    classify(Accuracy()).evaluate()
    assert not {"torchmetrics", "evaluate", "sklearn"} & (set(sys.modules) - before)
