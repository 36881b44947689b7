"""Which logged values belong to which curve."""

import math

from trainwright.report.history import Curve, curves_of, label_of, metrics_in, panels_of, thinned

HISTORY = [
    {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "epoch": 0.5, "step": 1},
    {"eval_a_loss": 3.0, "eval_a_f1": 0.5, "eval_a_runtime": 9.0, "step": 1},
    {"loss": math.nan, "learning_rate": 0.0, "step": 2},
    {"loss": 1.0, "note": "text", "step": 3},
    {"train_runtime": 5.0, "train_loss": 1.5, "step": 3},
    {"loss": 7.0},
]


def test_a_curve_holds_the_finite_numbers_that_have_a_step() -> None:
    curves = curves_of(HISTORY)
    assert curves["loss"] == Curve("loss", [1, 3], [2.0, 1.0])
    assert curves["learning_rate"] == Curve("learning_rate", [1, 2], [1e-3, 0.0])
    assert "note" not in curves


def test_losses_share_a_panel_and_what_an_evaluation_costs_has_none() -> None:
    panels = panels_of(HISTORY)
    assert [[curve.name for curve in panel.curves] for panel in panels] == [
        ["loss", "eval_a_loss"], ["eval_a_f1"], ["learning_rate"], ["grad_norm"],
    ]  # fmt: skip
    assert [panel.title for panel in panels] == ["Loss", "A f1", "Learning rate", "Gradient norm"]


def test_a_history_without_numbers_has_no_panel() -> None:
    assert panels_of([]) == panels_of([{"loss": math.inf, "step": 1}, {"loss": 1.0}]) == []


def test_metrics_are_what_measures_the_model_apart_from_losses() -> None:
    names = ["loss", "eval_loss", "eval_f1", "eval_runtime", "eval_steps_per_second", "epoch"]
    assert metrics_in(names) == ["eval_f1"]


def test_labels_tell_training_validation_and_datasets_apart() -> None:
    assert label_of("eval_dev_loss") == "Validation loss (dev)"
    assert len({label_of(name) for name in ("loss", "eval_loss", "eval_a_loss", "eval_b_loss")}) == 4


def test_a_thinned_curve_keeps_ends_and_spikes() -> None:
    values = [math.sin(step / 50) for step in range(10_000)]
    values[5_003], values[7_001] = 40.0, -40.0
    thin = thinned(Curve("loss", list(range(10_000)), values), 500)
    assert len(thin.steps) <= 502 and thin.steps == sorted(thin.steps)
    assert (thin.steps[0], thin.steps[-1]) == (0, 9_999)
    assert {5_003, 7_001} <= set(thin.steps)
    assert all(values[step] == value for step, value in zip(thin.steps, thin.values))


def test_a_short_curve_is_not_thinned() -> None:
    curve = Curve("loss", [1, 2], [3.0, 4.0])
    assert thinned(curve, 2) is curve
