"""The evaluation loop against a naive one, against the installed release, and by the number of host reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from trainwright.evaluation.accumulator import LoopSettings
from trainwright.evaluation.losses import weighted_mean
from trainwright.evaluation.run import Evaluation
from trainwright.evaluation.shortcuts import NO_SHORTCUTS, Shortcuts, can_coalesce
from trainwright.names import IGNORE_INDEX
from trainwright.nested import nested_concat
from trainwright.outputs import EvalLoopOutput, EvalPrediction
from trainwright.parallel.strategy import Strategy

NUM_CLASSES = 7
ALONE = Strategy(torch.device("cpu"))


@pytest.fixture(params=[False, True], ids=["plain", "coalescing"], autouse=True)
def coalesces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on the plain path, and on the one that appends batches in groups."""
    monkeypatch.setattr(f"{__name__}.COALESCES", request.param)


COALESCES = False


def run_evaluation(
    batches: Any, settings: LoopSettings, predict_batch: Any, strategy: Strategy = ALONE, **others: Any
) -> EvalLoopOutput:
    may = COALESCES and can_coalesce(settings, strategy.is_distributed)
    shortcuts = Shortcuts(coalesce=True) if may else NO_SHORTCUTS
    return Evaluation().run(batches, settings, predict_batch, strategy, shortcuts, **others)


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Token classification: (seq,) tokens and labels, of which a different number is ignored in each sample."""

    def __init__(self, num_samples: int = 10, length: int = 5) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 50, (num_samples, length), generator=generator)
        self.labels = torch.randint(0, NUM_CLASSES, (num_samples, length), generator=generator)
        for index in range(num_samples):
            self.labels[index, : index % length] = IGNORE_INDEX

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(50, NUM_CLASSES)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.embedding(input_ids)  # (batch, seq, class)
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


MODEL = Model()


@torch.no_grad()
def predict(inputs: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    outputs = MODEL(**inputs)
    return outputs.get("loss"), outputs["logits"], inputs.get("labels")


def loader(batch_size: int = 4, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Samples(**kwargs), batch_size=batch_size)


def ragged(num_batches: int = 6) -> list[dict[str, torch.Tensor]]:
    """Batches that differ in rows and in length."""
    return [next(iter(loader(batch_size=1 + i % 3, length=2 + i))) for i in range(num_batches)]


def accuracy(prediction: EvalPrediction) -> dict[str, Any]:
    logits, labels = prediction.predictions, prediction.label_ids
    kept = labels != IGNORE_INDEX
    return {"accuracy": (logits.argmax(-1) == labels)[kept].mean(), "eval_count": np.int64(kept.sum())}


def naive(batches: Any) -> tuple[Any, Any, Any, list[float], list[int], list[int]]:
    logits, labels, inputs, losses, sizes, items = None, None, None, [], [], []
    for batch in batches:
        loss, batch_logits, batch_labels = predict(batch)
        logits = batch_logits if logits is None else nested_concat(logits, batch_logits)
        labels = batch_labels if labels is None else nested_concat(labels, batch_labels)
        inputs = batch["input_ids"] if inputs is None else nested_concat(inputs, batch["input_ids"])
        losses.append(loss.item())
        sizes.append(len(batch_labels))
        items.append(int((batch_labels != IGNORE_INDEX).sum()))
    return logits.numpy(), labels.numpy(), inputs.numpy(), losses, sizes, items


@pytest.mark.parametrize("accumulation_steps", [None, 1, 4])
@pytest.mark.parametrize("loss_average", ["items", "batches"])
def test_the_result_equals_a_naive_loop(accumulation_steps: int | None, loss_average: str) -> None:
    logits, labels, inputs, losses, sizes, items = naive(ragged())
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, Any]:
        seen.append(prediction)
        return accuracy(prediction)

    settings = LoopSettings(
        accumulation_steps=accumulation_steps, include_inputs=True, include_losses=True, loss_average=loss_average
    )
    output = run_evaluation(ragged(), settings, predict_batch=predict, compute_metrics=metrics)
    assert np.array_equal(output.predictions, logits) and np.array_equal(output.label_ids, labels)
    assert output.num_samples == sum(sizes)
    assert output.metrics is not None
    weights = items if loss_average == "items" else sizes
    assert output.metrics["eval_loss"] == pytest.approx(np.average(losses, weights=weights))
    expected = accuracy(EvalPrediction(logits, labels))
    assert (
        output.metrics["eval_accuracy"] == expected["accuracy"]
        and output.metrics["eval_count"] == expected["eval_count"]
    )
    assert type(output.metrics["eval_count"]) is int
    assert np.array_equal(seen[0].inputs, inputs)
    assert seen[0].losses == pytest.approx(np.repeat(losses, sizes))


def test_batches_can_be_kept_apart() -> None:
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {}

    settings = LoopSettings(concat_batches=False, include_inputs=True, include_losses=True)
    output = run_evaluation(loader(4), settings, predict_batch=predict, compute_metrics=metrics)
    expected = [tuple(map(len, column)) for column in zip(*((b["labels"],) * 4 for b in loader(4)))]
    columns = (output.predictions, output.label_ids, seen[0].inputs, seen[0].losses)
    assert [tuple(map(len, column)) for column in columns] == expected == [(4, 4, 2)] * 4
    for batch, logits in zip(loader(4), output.predictions):
        assert np.array_equal(logits, predict(batch)[1].numpy())


def test_the_item_average_does_not_depend_on_the_batch_size_and_the_batch_average_does() -> None:
    def loss(batch_size: int, **settings: Any) -> float:
        chosen = LoopSettings(prediction_loss_only=True, **settings)
        metrics = run_evaluation(loader(batch_size), chosen, predict_batch=predict).metrics
        assert metrics is not None
        return float(metrics["eval_loss"])

    samples = Samples()
    exact = cross_entropy(MODEL(samples.tokens)["logits"].flatten(0, 1), samples.labels.flatten()).item()
    assert [loss(size) for size in (1, 3, 4, 10)] == pytest.approx([exact] * 4, rel=1e-6)
    assert abs(loss(1, loss_average="batches") - loss(10, loss_average="batches")) > 1e-3


def test_a_shifted_loss_does_not_count_the_first_label() -> None:
    labels = [torch.tensor([[1, 2, 3], [4, -100, -100]]), torch.tensor([[5, 6, -100]])]
    losses = iter([torch.tensor(1.0), torch.tensor(4.0)])
    output = run_evaluation(
        [{"labels": batch} for batch in labels],
        LoopSettings(labels_are_shifted=True),
        predict_batch=lambda inputs: (next(losses), None, inputs["labels"]),
    )
    assert output.metrics == {"eval_loss": pytest.approx((2 * 1.0 + 1 * 4.0) / 3)}


@pytest.mark.parametrize(
    "inputs",
    [
        [{"x": torch.ones(n, 2), "labels": torch.ones(n)} for n in (3, 1)],  # regression
        [{"x": torch.ones(n, 2), "labels": torch.ones(n, 4)} for n in (3, 1)],  # several floats a sample
        [{"x": torch.ones(n, 2), "start": torch.ones(n, 5), "end": torch.ones(n, 5)} for n in (3, 1)],
        [{"x": torch.ones(n, 2)} for n in (3, 1)],
    ],
)
def test_labels_that_are_not_tokens_weigh_a_sample_each(inputs: list[dict[str, torch.Tensor]]) -> None:
    losses = iter([torch.tensor(1.0), torch.tensor(5.0)])
    settings = LoopSettings(label_names=("labels", "start", "end"))
    output = run_evaluation(inputs, settings, predict_batch=lambda batch: (next(losses), None, None))
    assert output.metrics == {"eval_loss": (3 * 1.0 + 1 * 5.0) / 4} and output.num_samples == 4


def test_a_batch_without_any_target_does_not_turn_the_loss_into_nan() -> None:
    losses, items = np.array([np.nan, 1.0, 4.0], np.float32), np.array([0.0, 1.0, 3.0], np.float32)
    assert weighted_mean(losses, items) == (1.0 + 3 * 4.0) / 4
    assert np.isnan(weighted_mean(losses, items * 0))


def test_losses_can_be_averaged_by_the_caller() -> None:
    seen: list[np.ndarray[Any, Any]] = []

    def average(losses: np.ndarray[Any, Any]) -> float:
        seen.append(losses)
        return 42.0

    output = run_evaluation(loader(4), LoopSettings(), predict_batch=predict, average_losses=average)
    assert output.metrics == {"eval_loss": 42.0}
    assert seen[0] == pytest.approx(np.repeat(naive(loader(4))[3], [4, 4, 2]))


def test_without_labels_there_are_predictions_and_no_metrics() -> None:
    batches = [{"input_ids": batch["input_ids"]} for batch in loader(4)]
    output = run_evaluation(batches, LoopSettings(), predict_batch=predict, compute_metrics=accuracy)
    assert len(output.predictions) == 10 and output.label_ids is None and output.metrics == {}


def test_loss_only_keeps_nothing_else() -> None:
    settings = LoopSettings(prediction_loss_only=True, include_inputs=True)
    output = run_evaluation(loader(4), settings, predict_batch=predict, compute_metrics=accuracy)
    assert output.predictions is None and output.label_ids is None and list(output.metrics or {}) == ["eval_loss"]


def test_an_empty_dataset_gives_no_samples_and_no_metrics() -> None:
    output = run_evaluation([], LoopSettings(), predict_batch=predict, compute_metrics=accuracy, num_samples=0)
    assert output == (None, None, {}, 0)


def test_logits_can_be_reduced_before_they_are_kept() -> None:
    def reduce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert logits.shape[:2] == labels.shape
        return logits.argmax(-1)

    output = run_evaluation(loader(4), LoopSettings(), predict_batch=predict, preprocess_logits=reduce)
    assert np.array_equal(output.predictions, naive(loader(4))[0].argmax(-1))


@pytest.mark.parametrize("num_batches", [1, 2, 3])
def test_batch_metrics_see_every_batch_and_summarise_on_the_last(num_batches: int) -> None:
    calls: list[tuple[int, bool]] = []
    fields: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction, compute_result: bool) -> dict[str, float] | None:
        calls.append((len(prediction.label_ids), compute_result))
        fields.append(prediction)
        return {"count": sum(n for n, _ in calls)} if compute_result else None

    def unsized() -> Iterator[Any]:
        yield from loader(4, num_samples=4 * num_batches)

    settings = LoopSettings(batch_metrics=True, keep_predictions=False, include_inputs=True, include_losses=True)
    output = run_evaluation(unsized(), settings, predict_batch=predict, compute_metrics=metrics)
    assert calls == [(4, False)] * (num_batches - 1) + [(4, True)]
    assert output.predictions is None and output.label_ids is None
    assert output.metrics is not None and output.metrics["eval_count"] == 4 * num_batches
    assert list(fields[0].inputs) == ["input_ids", "labels"] and fields[0].losses.shape == (4,)


def test_metric_keys_get_the_prefix() -> None:
    settings = LoopSettings(metric_key_prefix="test")
    output = run_evaluation(loader(4), settings, predict_batch=predict, compute_metrics=accuracy)
    assert set(output.metrics or {}) == {"test_accuracy", "test_eval_count", "test_loss"}


def test_after_every_batch_the_caller_is_told() -> None:
    told: list[int] = []
    run_evaluation(loader(4), LoopSettings(), predict_batch=predict, after_batch=lambda: told.append(1))
    assert len(told) == 3


def test_samples_that_a_second_process_repeats_are_cut_off() -> None:
    class TwoAlike(Strategy):
        """Two processes with the same batch: gathering doubles every row, so 20 rows of which 17 are samples."""

        is_distributed = True

        def gather_for_metrics(self, value: Any) -> Any:
            return torch.cat([value, value])

        def pad_across_processes(self, value: Any, dim: int = 1, pad_index: int = 0) -> Any:
            assert (dim, pad_index) == (1, IGNORE_INDEX)
            return value

    settings = LoopSettings(include_inputs=True, include_losses=True)
    shapes: list[Any] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        shapes.extend(len(element) for element in prediction)
        return {}

    output = run_evaluation(
        loader(4),
        settings,
        predict_batch=predict,
        compute_metrics=metrics,
        strategy=TwoAlike(torch.device("cpu")),
        num_samples=17,
    )
    assert shapes == [17] * 4 and output.num_samples == 17 and len(output.predictions) == 17


class HostReads(TorchDispatchMode):
    """Counts the operators that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(
            name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
        ):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_average", ["items", "batches"])
def test_no_batch_reads_a_number_from_the_device(loss_average: str) -> None:
    settings = LoopSettings(
        loss_average=loss_average, include_inputs=True, include_losses=True, labels_are_shifted=True
    )
    for num_samples in (8, 160):
        batches = list(loader(4, num_samples=num_samples))  # starting a DataLoader draws a seed, which is a read
        with HostReads() as reads:
            output = run_evaluation(batches, settings, predict_batch=predict, compute_metrics=accuracy)
        assert output.num_samples == num_samples and reads.names == []


@pytest.mark.parametrize("result", [None, 0.5, [1]])
def test_metrics_that_are_no_dict_are_a_type_error(result: Any) -> None:
    with pytest.raises(TypeError, match="must return a dict"):
        run_evaluation(loader(4), LoopSettings(), predict_batch=predict, compute_metrics=lambda prediction: result)
    settings = LoopSettings(batch_metrics=True)
    with pytest.raises(TypeError, match="must with compute_result=True return a dict"):
        run_evaluation(loader(4), settings, predict_batch=predict, compute_metrics=lambda p, compute_result: result)


def test_batch_metrics_without_compute_result_fail_before_the_first_batch() -> None:
    def never(inputs: Any) -> Any:
        raise AssertionError("a batch was predicted")

    with pytest.raises(ValueError, match="'accuracy' takes no argument compute_result"):
        run_evaluation(loader(4), LoopSettings(batch_metrics=True), predict_batch=never, compute_metrics=accuracy)


def test_an_unknown_main_input_and_an_unknown_average_are_named() -> None:
    with pytest.raises(KeyError, match="input_ids"):
        settings = LoopSettings(include_inputs=True)
        run_evaluation(loader(4), settings, predict_batch=predict, main_input_name="input_id")
    with pytest.raises(ValueError, match="Did you mean 'items'"):
        LoopSettings(loss_average="item")


@pytest.mark.parametrize("accumulation_steps", [None, 2])
def test_the_installed_release_gives_the_same(tmp_path: Path, accumulation_steps: int | None) -> None:
    transformers = pytest.importorskip("transformers")
    include = ["inputs", "loss"]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        eval_accumulation_steps=accumulation_steps,
        include_for_metrics=include,
    )
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, Any]:
        seen.append(prediction)
        return accuracy(prediction)

    trainer = transformers.Trainer(model=MODEL, args=args, compute_metrics=metrics)
    theirs = trainer.evaluation_loop(trainer.get_eval_dataloader(Samples()), description="parity")
    settings = LoopSettings(
        accumulation_steps=accumulation_steps, include_inputs=True, include_losses=True, loss_average="batches"
    )
    mine = run_evaluation(loader(4), settings, predict_batch=predict, compute_metrics=metrics, num_samples=10)
    assert np.array_equal(mine.predictions, theirs.predictions) and np.array_equal(mine.label_ids, theirs.label_ids)
    assert mine.num_samples == theirs.num_samples
    expected = {key: value for key, value in theirs.metrics.items() if "preparation_time" not in key}
    assert mine.metrics == {**expected, "eval_loss": pytest.approx(expected["eval_loss"])}
    for left, right in zip(*(prediction.elements for prediction in seen)):
        assert left.dtype == right.dtype and np.allclose(left, right)
