"""`evaluate()` and `predict()` agree with the reference: arrays, metrics and their names, over ragged rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

TIMES = ("runtime", "per_second")
BOTH = ["bert", "gpt2"]


def assert_same(left: Any, right: Any) -> None:
    """Nested lists, tuples, dicts and arrays are equal, to 1e-6 and in dtype and shape."""
    if isinstance(left, (list, tuple)):
        assert type(left) is type(right) and len(left) == len(right)
        for one, other in zip(left, right):
            assert_same(one, other)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif left is None or right is None:
        assert left is right
    else:
        left, right = np.asarray(left), np.asarray(right)
        assert left.dtype == right.dtype and left.shape == right.shape
        np.testing.assert_allclose(left, right, atol=1e-6, rtol=1e-6)


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.endswith(TIMES)}


def without_chosen(metrics: dict[str, float]) -> dict[str, float]:
    """The reference's metrics without the two names that ours leaves out before training (see test_differences)."""
    return {k: v for k, v in metrics.items() if k != "epoch" and not k.endswith("model_preparation_time")}


class Seen:
    """A compute_metrics that keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        self.given.append((prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses))
        first = prediction.predictions[0] if isinstance(prediction.predictions, list) else prediction.predictions
        first = first[0] if isinstance(first, tuple) else first
        return {"spread": float(np.asarray(first).std()), "batches": float(len(self.given))}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"eval_accumulation_steps": 2},
    "inputs": {"include_for_metrics": ["inputs"]},
    "losses": {"include_for_metrics": ["loss"]},
    "inputs and losses": {"include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 1},
    "a metric per batch": {"batch_eval_metrics": True},
    "a metric per batch, with inputs and losses": {
        "batch_eval_metrics": True,
        "include_for_metrics": ["inputs", "loss"],
    },
    "unconcatenated": {"eval_do_concat_batches": False},
    "loss only": {"prediction_loss_only": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", BOTH)
def test_evaluate_gives_the_same_metrics_from_the_same_arrays(columns: Any, kind: str, options: dict[str, Any]) -> None:
    results = []
    for column, own in (("ours", {"eval_loss_average": "batches"}), ("reference", {})):
        seen = Seen()
        trainer = columns.trainer(column, kind, given={"compute_metrics": seen}, **options, **own)
        metrics = without_chosen(trainer.evaluate(metric_key_prefix="valid"))
        given = [[getattr(part, "detach", lambda p=part: p)() for part in call] for call in seen.given]
        results.append((metrics.keys(), untimed(metrics), given))
    (our_keys, ours, our_given), (their_keys, theirs, their_given) = results
    assert our_keys == their_keys
    assert_same(ours, theirs)
    assert_same(our_given, their_given)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", BOTH)
def test_predict_gives_the_same_arrays(columns: Any, kind: str, options: dict[str, Any]) -> None:
    results = []
    for column, own in (("ours", {"eval_loss_average": "batches"}), ("reference", {})):
        trainer = columns.trainer(column, kind, given={"compute_metrics": Seen()}, **options, **own)
        output = trainer.predict(columns.build_data(kind, 11, seed=6))
        metrics = without_chosen(output.metrics)
        results.append((output.predictions, output.label_ids, untimed(metrics), sorted(metrics)))
    assert_same(results[0][:3], results[1][:3])
    assert results[0][3] == results[1][3]


def test_ignored_outputs_are_left_out_of_the_predictions(columns: Any) -> None:
    def predictions(column: str, ignore_keys: list[str] | None) -> Any:
        trainer = columns.trainer(column, "bert")
        trainer.model.config.output_hidden_states = True
        return trainer.predict(columns.build_data("bert", 11), ignore_keys=ignore_keys).predictions

    for ignore_keys in (None, ["hidden_states"]):
        ours = predictions("ours", ignore_keys)
        assert_same(ours, predictions("reference", ignore_keys))
        assert isinstance(ours, tuple) == (ignore_keys is None)


def test_logits_preprocessed_before_a_metric_are_the_same(columns: Any) -> None:
    given = []
    for column in ("ours", "reference"):
        seen = Seen()
        columns.trainer(
            column, "gpt2",
            given={"compute_metrics": seen, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
        ).evaluate()  # fmt: skip
        given.append(seen.given)
    assert_same(given[0], given[1])


def test_several_datasets_give_the_same_names(columns: Any) -> None:
    sets = {"near": columns.build_data("bert", 5), "far": columns.build_data("bert", 6, seed=9)}
    ours, theirs = (
        without_chosen(columns.trainer(column, "bert", given={"eval_dataset": sets}, **own).evaluate())
        for column, own in (("ours", {"eval_loss_average": "batches"}), ("reference", {}))
    )
    assert ours.keys() == theirs.keys()
    assert_same(untimed(ours), untimed(theirs))


def test_unlabelled_samples_are_predicted_alike(columns: Any) -> None:
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in columns.build_data("bert", 7)]
    ours, theirs = (columns.trainer(column, "bert").predict(unlabelled) for column in ("ours", "reference"))
    assert ours.label_ids is None and theirs.label_ids is None
    assert_same(ours.predictions, theirs.predictions)
    assert ours.metrics.keys() == without_chosen(theirs.metrics).keys()


@pytest.mark.parametrize("kind", ["regression", "bert", "gpt2", "t5"])
def test_the_parameters_that_decay_are_the_same(columns: Any, kind: str) -> None:
    ours, theirs = (columns.trainer(column, kind) for column in ("ours", "reference"))
    names = ours.get_decay_parameter_names(ours.model)
    assert sorted(names) == sorted(theirs.get_decay_parameter_names(theirs.model))
    assert 0 < len(names) < len(list(ours.model.parameters()))


def test_a_metric_per_batch_needs_no_predictions_in_an_evaluation(columns: Any) -> None:
    def metric(prediction: Any, compute_result: bool) -> dict[str, float]:
        return {"rows": float(len(prediction.predictions))}

    kept = []
    for column in ("ours", "reference"):
        trainer = columns.trainer(column, "bert", batch_eval_metrics=True, given={"compute_metrics": metric})
        loop, outputs = trainer.evaluation_loop, []
        trainer.evaluation_loop = lambda *a, loop=loop, outputs=outputs, **k: (
            outputs.append(loop(*a, **k)) or outputs[-1]
        )
        trainer.evaluate()
        kept.append(outputs[0].predictions)
        assert len(trainer.predict(columns.build_data("bert", 7)).predictions) == 7
    assert kept == [None, None]
