"""Learning-rate schedules against their closed forms, against the installed transformers, and through a save."""

from __future__ import annotations

import inspect
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainwright.interop.optional import installed_version
from trainwright.names import SchedulerType
from trainwright.optim import schedules
from trainwright.optim.schedules import get_scheduler

LR = 0.1
WARMUP, TOTAL = 4, 17


def make_optimizer() -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": [weights[0]]}, {"params": [weights[1]], "lr": 3 * LR}]
    return torch.optim.SGD(groups, lr=LR)


def walk(schedule: Any, optimizer: torch.optim.Optimizer, num_steps: int = TOTAL + 4) -> list[list[float]]:
    """The learning rates of every group at every step, from step 0."""
    rates = []
    for _ in range(num_steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates


def rise(step: int) -> float:
    return step / WARMUP


def p(step: int) -> float:
    return (step - WARMUP) / (TOTAL - WARMUP)


def wsd(step: int) -> float:
    num_decay, floor = 5, 0.2
    start = TOTAL - num_decay
    if step < WARMUP:
        return floor + (1 - floor) * (1 - math.cos(math.pi * rise(step))) / 2
    if step < start:
        return 1.0
    return floor if step >= TOTAL else floor + (1 - floor) * (1 - math.sqrt((step - start) / num_decay))


# name, specific arguments, closed form of the factor at a step
CASES: list[tuple[str, dict[str, Any], Callable[[int], float]]] = [
    ("constant", {}, lambda s: 1.0),
    ("constant_with_warmup", {}, lambda s: min(1.0, rise(s))),
    ("linear", {}, lambda s: rise(s) if s < WARMUP else max(0.0, 1 - p(s))),
    ("cosine", {}, lambda s: rise(s) if s < WARMUP else 0.5 * (1 + math.cos(math.pi * p(s)))),
    ("cosine", {"num_cycles": 1.5}, lambda s: rise(s) if s < WARMUP else 0.5 * (1 + math.cos(math.pi * 3 * p(s)))),
    (
        "cosine_with_restarts",
        {"num_cycles": 3},
        lambda s: rise(s) if s < WARMUP else 0.0 if s >= TOTAL else 0.5 * (1 + math.cos(math.pi * ((3 * p(s)) % 1))),
    ),
    (
        "polynomial",
        {"lr_end": 0.02, "power": 2.0},
        lambda s: rise(s) if s < WARMUP else (0.02 + (LR - 0.02) * (1 - min(1.0, p(s))) ** 2) / LR,
    ),
    ("inverse_sqrt", {}, lambda s: rise(s) if s < WARMUP else math.sqrt(WARMUP / s)),
    (
        "cosine_with_min_lr",
        {"min_lr": 0.03},
        lambda s: rise(s) if s < WARMUP else 0.3 + 0.7 * 0.5 * (1 + math.cos(math.pi * p(s))),
    ),
    (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.25},
        lambda s: rise(s) if s < WARMUP else 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * p(s))),
    ),
    (
        "cosine_warmup_with_min_lr",
        {"min_lr_rate": 0.25},
        lambda s: (s + 1) / WARMUP if s < WARMUP else 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * p(s + 1))),
    ),
    (
        "cosine_warmup_with_min_lr",
        {"min_lr": 0.01, "warmup_lr_rate": 0.4},
        lambda s: 0.4 + 0.6 * s / (WARMUP - 1) if s < WARMUP else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * p(s + 1))),
    ),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 5, "warmup_type": "cosine", "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
        wsd,
    ),
]
IDS = [f"{name}-{'-'.join(kwargs)}" for name, kwargs, _ in CASES]
WSD_SHAPES = [
    {"num_decay_steps": 5, "warmup_type": rising, "decay_type": falling, "min_lr_ratio": 0.1, "num_cycles": cycles}
    for rising in ("linear", "cosine", "1-sqrt")
    for falling in ("linear", "cosine", "1-sqrt")
    for cycles in (0.5, 1.0)
]


def test_every_schedule_of_a_formula_has_a_closed_form_here() -> None:
    by_metric = {"greedy", "reduce_lr_on_plateau"}  # see test_schedules_in_training.py
    assert {name for name, _, _ in CASES} == {kind.value for kind in SchedulerType} - by_metric


@pytest.mark.parametrize(("name", "kwargs", "factor"), CASES, ids=IDS)
def test_every_step_follows_the_closed_form(name: str, kwargs: dict[str, Any], factor: Callable[[int], float]) -> None:
    optimizer = make_optimizer()
    rates = walk(get_scheduler(name, optimizer, WARMUP, TOTAL, kwargs), optimizer)
    expected = [[LR * factor(step), 3 * LR * factor(step)] for step in range(len(rates))]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


RISING = {  # 0 to 1, over a progress of 0 to 1
    "linear": lambda p: p,
    "cosine": lambda p: math.sin(math.pi * p / 2) ** 2,
    "1-sqrt": lambda p: 1 - (1 - p) ** 0.5,
}


@pytest.mark.parametrize("shape", WSD_SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_every_shape_of_a_warmup_stable_decay_follows_its_closed_form(shape: dict[str, Any]) -> None:
    optimizer = make_optimizer()
    rates = walk(get_scheduler("warmup_stable_decay", optimizer, WARMUP, TOTAL, shape), optimizer)
    num_decay, floor = shape["num_decay_steps"], shape["min_lr_ratio"]
    start = TOTAL - num_decay
    for step, (rate, other) in enumerate(rates):
        if step < WARMUP:
            share = RISING[shape["warmup_type"]](step / WARMUP)
        elif step < start:
            share = 1.0
        elif step >= TOTAL:
            share = 0.0
        elif shape["decay_type"] == "cosine":  # `num_cycles` turns; a half turn ends at the floor
            share = math.cos(math.pi * shape["num_cycles"] * (step - start) / num_decay) ** 2
        else:
            share = RISING[shape["decay_type"]]((TOTAL - step) / num_decay)
        assert rate == pytest.approx(LR * (floor + (1 - floor) * share), rel=1e-12, abs=1e-15), step
        assert other == pytest.approx(3 * rate)


@pytest.mark.parametrize("num_warmup_steps", [0, 1, 4, 17])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [(name, kwargs) for name, kwargs, _ in CASES] + [("warmup_stable_decay", shape) for shape in WSD_SHAPES],
)
def test_every_step_equals_the_installed_transformers(name: str, kwargs: dict[str, Any], num_warmup_steps: int) -> None:
    reference = pytest.importorskip("transformers.optimization")
    if name == "polynomial" and num_warmup_steps == TOTAL:
        pytest.skip("the reference divides by zero where the whole run is warmup")
    ours, theirs = make_optimizer(), make_optimizer()
    schedule = get_scheduler(name, ours, num_warmup_steps, TOTAL, kwargs)
    other = reference.get_scheduler(name, theirs, num_warmup_steps, TOTAL, kwargs)
    for step, (mine, expected) in enumerate(zip(walk(schedule, ours), walk(other, theirs))):
        assert mine == pytest.approx(expected, rel=1e-12, abs=1e-15), step


def test_the_timescale_of_inverse_sqrt_is_honoured() -> None:
    optimizer = make_optimizer()
    schedule = schedules.get_inverse_sqrt_schedule(optimizer, WARMUP, timescale=3)
    rates = [rate[0] for rate in walk(schedule, optimizer)]
    assert rates[WARMUP:] == pytest.approx([LR / math.sqrt(1 + n / 3) for n in range(len(rates) - WARMUP)])
    if (installed_version("transformers") or (0,)) >= (5,):  # earlier releases ignore the argument
        reference = pytest.importorskip("transformers.optimization")
        other = make_optimizer()
        assert rates == pytest.approx(
            [r[0] for r in walk(reference.get_inverse_sqrt_schedule(other, WARMUP, 3), other)]
        )


@pytest.mark.parametrize(("name", "kwargs"), [(name, kwargs) for name, kwargs, _ in CASES], ids=IDS)
def test_a_schedule_resumes_where_its_state_was_saved(name: str, kwargs: dict[str, Any]) -> None:
    whole = make_optimizer()
    expected = walk(get_scheduler(name, whole, WARMUP, TOTAL, kwargs), whole)
    first = make_optimizer()
    schedule = get_scheduler(name, first, WARMUP, TOTAL, kwargs)
    walk(schedule, first, 7)
    state, groups = pickle.loads(pickle.dumps((schedule.state_dict(), first.state_dict())))

    second = make_optimizer()
    second.load_state_dict(groups)
    resumed = get_scheduler(name, second, WARMUP, TOTAL, kwargs)
    resumed.load_state_dict(state)
    second.load_state_dict(groups)
    assert walk(resumed, second, len(expected) - 7) == expected[7:]


@pytest.mark.parametrize(("name", "kwargs"), [(name, kwargs) for name, kwargs, _ in CASES], ids=IDS)
def test_saved_states_are_those_of_the_installed_transformers(name: str, kwargs: dict[str, Any]) -> None:
    reference = pytest.importorskip("transformers.optimization")
    ours, theirs = make_optimizer(), make_optimizer()
    schedule = get_scheduler(name, ours, WARMUP, TOTAL, kwargs)
    other = reference.get_scheduler(name, theirs, WARMUP, TOTAL, kwargs)
    walk(schedule, ours, 6)
    walk(other, theirs, 6)
    mine, saved = schedule.state_dict(), other.state_dict()
    assert mine.keys() == saved.keys()
    assert mine["lr_lambdas"] == saved["lr_lambdas"]
    fresh = make_optimizer()
    resumed = get_scheduler(name, fresh, WARMUP, TOTAL, kwargs)
    resumed.load_state_dict(saved)
    fresh.load_state_dict(theirs.state_dict())
    assert walk(resumed, fresh, 8) == [pytest.approx(rates, rel=1e-12) for rates in walk(other, theirs, 8)]


@pytest.mark.parametrize(("name", "kwargs"), [(name, kwargs) for name, kwargs, _ in CASES], ids=IDS)
def test_the_factors_of_a_schedule_pickle(name: str, kwargs: dict[str, Any]) -> None:
    schedule: Any = get_scheduler(name, make_optimizer(), WARMUP, TOTAL, kwargs)
    copies = pickle.loads(pickle.dumps(schedule.lr_lambdas))
    for step in range(TOTAL + 4):
        assert [factor(step) for factor in copies] == [factor(step) for factor in schedule.lr_lambdas]


def test_signatures_are_those_of_the_installed_transformers() -> None:
    reference = pytest.importorskip("transformers.optimization")
    names = [name for name in dir(reference) if name.startswith("get_") and hasattr(schedules, name)]
    assert len(names) >= 12
    for name in names:
        shape = [
            [
                (parameter.name, parameter.default, parameter.kind)
                for parameter in inspect.signature(f).parameters.values()
            ]
            for f in (getattr(schedules, name), getattr(reference, name))
        ]
        assert shape[0] == shape[1], name


def test_every_documented_name_builds_a_schedule() -> None:
    specific: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 2},
    }
    for kind in SchedulerType:
        optimizer = make_optimizer()
        schedule = get_scheduler(kind, optimizer, WARMUP, TOTAL, specific.get(kind.value))
        assert len(schedule.state_dict()["_last_lr"]) == 2, kind


def test_reduce_on_plateau_takes_the_arguments_of_torch() -> None:
    optimizer = make_optimizer()
    schedule: Any = get_scheduler(
        "reduce_lr_on_plateau", optimizer, scheduler_specific_kwargs={"factor": 0.5, "patience": 0}
    )
    schedule.step(1.0)
    schedule.step(2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [LR * 0.5, 3 * LR * 0.5]


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'cosin' is not a valid SchedulerType.*Did you mean 'cosine'\?"):
        get_scheduler("cosin", make_optimizer(), 1, 2)


@pytest.mark.parametrize("name", ["cosine", "constant", "greedy", "reduce_lr_on_plateau"])
def test_an_unknown_argument_names_the_allowed_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"has no argument 'bogus' \(lr_scheduler_kwargs\); it takes \["):
        get_scheduler(name, make_optimizer(), 1, 2, {"bogus": 1})


def test_a_misspelt_argument_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'num_cycles'\?"):
        get_scheduler("cosine", make_optimizer(), 1, 2, {"num_cycle": 1})


@pytest.mark.parametrize(
    ("name", "counts", "missing"),
    [
        ("linear", {}, "num_warmup_steps"),
        ("linear", {"num_warmup_steps": 1}, "num_training_steps"),
        ("constant_with_warmup", {}, "num_warmup_steps"),
        ("warmup_stable_decay", {"num_warmup_steps": 1, "num_training_steps": 5}, "num_decay_steps"),
    ],
)
def test_a_missing_count_is_named(name: str, counts: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValueError, match=f"requires `{missing}`"):
        get_scheduler(name, make_optimizer(), **counts)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({}, "needs its floor"), ({"min_lr": 0.01, "min_lr_rate": 0.1}, "Only one of min_lr=0.01 and min_lr_rate=0.1")],
)
def test_the_floor_of_a_cosine_is_named_exactly_once(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_scheduler("cosine_with_min_lr", make_optimizer(), 1, 5, kwargs)


def test_a_polynomial_cannot_fall_to_a_rate_above_its_start() -> None:
    with pytest.raises(ValueError, match=r"lr_end=1.0 must lie below the initial learning rate 0.1"):
        get_scheduler("polynomial", make_optimizer(), 1, 5, {"lr_end": 1.0})


def test_wsd_reports_unknown_shapes_and_conflicting_lengths() -> None:
    with pytest.raises(ValueError, match=r"decay_type='cosin' is unknown.*Did you mean 'cosine'\?"):
        get_scheduler("warmup_stable_decay", make_optimizer(), 1, 9, {"num_decay_steps": 2, "decay_type": "cosin"})
    with pytest.raises(ValueError, match="needs num_training_steps or num_stable_steps"):
        schedules.get_wsd_schedule(make_optimizer(), 1, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = make_optimizer()
        schedule = schedules.get_wsd_schedule(optimizer, 1, 2, num_training_steps=9, num_stable_steps=1)
    assert "num_stable_steps=1 wins" in str(caught[0].message)
    assert [rate[0] for rate in walk(schedule, optimizer, 5)] == pytest.approx([0.0, LR, LR, LR / 2, 0.0])
