"""GreedyLR: what it does by hand-computed examples, and that it walks with the installed transformers."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from trainwright.optim.greedy import GreedyLR, StreamingAverage


def make_optimizer(num_groups: int = 1) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1 * (n + 1)} for n in range(num_groups)]
    return torch.optim.SGD(groups, lr=0.1)


def rates_after(metrics: list[float], **kwargs: Any) -> list[float]:
    optimizer = make_optimizer()
    schedule = GreedyLR(optimizer, **kwargs)
    rates = []
    for metric in metrics:
        schedule.step(metric)
        rates.append(schedule.get_last_lr()[0])
    assert rates[-1] == optimizer.param_groups[0]["lr"]
    return rates


def test_it_raises_the_rate_after_more_good_evaluations_than_patience() -> None:
    assert rates_after([5, 4, 3, 2, 1], patience=1, factor=0.5) == pytest.approx([0.1, 0.2, 0.2, 0.4, 0.4])


def test_it_lowers_the_rate_after_more_bad_evaluations_than_patience() -> None:
    assert rates_after([1, 2, 3, 4, 5], patience=1, factor=0.5) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_it_stays_within_its_bounds() -> None:
    assert rates_after([5, 4, 3, 2], patience=0, factor=0.5, max_lr=0.3)[-1] == 0.3
    assert rates_after([1, 2, 3, 4, 5], patience=0, factor=0.5, min_lr=0.04)[-1] == 0.04


def test_evaluations_during_cooldown_are_not_looked_at() -> None:
    rates = rates_after([1, 2, 9, 9, 9], patience=0, factor=0.5, cooldown=2, max_lr=0.1)
    assert rates == pytest.approx([0.1, 0.05, 0.05, 0.05, 0.025])


def test_it_starts_afresh_after_reset_start_reductions_at_the_lower_bound() -> None:
    rates = rates_after([1, 2, 3, 4, 5], patience=0, factor=0.5, min_lr=0.05, max_lr=0.1, reset_start=3)
    assert rates == pytest.approx([0.1, 0.05, 0.05, 0.1, 0.1])


def test_the_streaming_average_is_the_mean_of_its_window() -> None:
    average = StreamingAverage(3)
    values = [1.0, 2.0, 6.0, 4.0, 8.0]
    means = [average.streamavg(value) for value in values]
    assert means == pytest.approx([sum(values[max(0, n - 2) : n + 1]) / min(3, n + 1) for n in range(5)])


@pytest.mark.parametrize("seed", range(60))
def test_it_walks_with_the_installed_transformers(seed: int) -> None:
    reference = getattr(pytest.importorskip("transformers.optimization"), "GreedyLR", None)
    if reference is None:
        pytest.skip("this release of transformers has no GreedyLR")
    dice = random.Random(seed)
    kwargs: dict[str, Any] = {
        "mode": dice.choice(["min", "max"]),
        "factor": dice.choice([0.3, 0.5, 0.9]),
        "patience": dice.choice([0, 1, 3]),
        "threshold": dice.choice([1e-6, 0.01, 0.1]),
        "threshold_mode": dice.choice(["rel", "abs"]),
        "cooldown": dice.choice([0, 1, 3]),
        "warmup": dice.choice([0, 1, 3]),
        "min_lr": dice.choice([1e-3, 0.09, [0.02, 0.07]]),
        "max_lr": dice.choice([0.11, 1.0, [0.2, 0.3]]),
        "eps": dice.choice([1e-8, 1e-2]),
        "smooth": dice.random() < 0.4,
        "window_size": dice.choice([1, 3, 50]),
        "reset_start": dice.choice([0, 1, 5]),
    }
    ours, theirs = GreedyLR(make_optimizer(2), **kwargs), reference(make_optimizer(2), **kwargs)
    metric, drift = 1.0, dice.choice([-0.05, 0.0, 0.05])
    for step in range(80):
        drift = -drift if dice.random() < 0.05 else drift
        metric += drift + dice.gauss(0, 0.03)
        ours.step(metric)
        theirs.step(metric)
        assert ours.state_dict() == theirs.state_dict(), step
        if step == 40:  # its saved state, through JSON, continues here
            ours = GreedyLR(make_optimizer(2), **kwargs)
            ours.load_state_dict(json.loads(json.dumps(theirs.state_dict())))


def test_a_resumed_schedule_restores_the_rates_of_the_optimizer() -> None:
    first = GreedyLR(make_optimizer(), patience=0, factor=0.5)
    first.step(1.0)
    optimizer = make_optimizer()
    GreedyLR(optimizer, patience=0, factor=0.5).load_state_dict(first.state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"factor": 1.0}, "factor=1.0 must be below 1"),
        ({"mode": "mim"}, r"mode='mim' is unknown.*Did you mean 'min'\?"),
        ({"threshold_mode": "ab"}, r"threshold_mode='ab' is unknown.*Did you mean 'abs'\?"),
        ({"min_lr": [0.1, 0.2]}, "min_lr has 2 values, but the optimizer has 1 parameter groups"),
        ({"max_lr": [0.1, 0.2]}, "max_lr has 2 values, but the optimizer has 1 parameter groups"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GreedyLR(make_optimizer(), **kwargs)
