"""The same sentences for every installed tracker, its real package, offline, read back with its own reader.

What a package has no room for is in its reader's `lacks`, and held here: nothing is left out without a word.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import odd_values
import scenarios
from battery import Reader, StoredRun, needs, program, reader_of, readers, stored

PARAMETERS = [
    pytest.param(reader.name, marks=pytest.mark.xdist_group(reader.name), id=reader.name) for reader in readers()
]
Points = list[tuple[str, int | None, float]]


@pytest.fixture(params=PARAMETERS)
def reader(request) -> Reader:
    needs(request.param)
    return reader_of(request.param)


@functools.cache
def outcome(name: str, scenario: str, folder: Path) -> tuple[Any, list[StoredRun]]:
    """What a scenario returned and what was stored then, once per tracker."""
    reader = reader_of(name)
    place = folder / name / scenario
    if scenario == "resumed":
        program(reader, place, lambda: scenarios.crashed(reader), code=9)
    returned = program(reader, place, lambda: getattr(scenarios, scenario)(reader))
    return returned, stored(reader, place)


@pytest.fixture
def run(reader, tmp_path_factory):
    """`run("train")`: what the scenario returned, and the runs that were stored."""
    return lambda scenario: outcome(reader.name, scenario, tmp_path_factory.getbasetemp() / "trackers")


def points_of(reader: Reader, history: scenarios.History, *names: str) -> Points:
    """The values of `names` in log lines, as the tracker should have them."""
    return [
        (reader.scalar(name), None if "steps" in reader.lacks else line["step"], line[name])
        for name in names
        for line in history
        if name in line
    ]


def points_in(stored_run: StoredRun, names: set[str]) -> Points:
    return [(name, *point) for name in sorted(names) for point in stored_run.scalars.get(name, [])]


def same_points(found: Points, expected: Points) -> bool:
    """Equal in float32, which some packages store."""
    if len(found) != len(expected):
        return False
    pairs = zip(sorted(found, key=str), sorted(expected, key=str))
    return all(a[:2] == b[:2] and math.isclose(a[2], b[2], rel_tol=1e-6) for a, b in pairs)


def check_points(reader: Reader, stored_run: StoredRun, expected: Points) -> None:
    found = points_in(stored_run, {name for name, *_ in expected})
    if "scalars" in reader.lacks:
        expected = []
    assert same_points(found, expected), f"found {found}\nexpected {expected}"


def statuses(reader: Reader, *wanted: str) -> list[str | None]:
    if "status" in reader.lacks:
        return [None] * len(wanted)
    instead = {"killed": "failed", "finished": None}
    return [instead[status] if status in reader.lacks else status for status in wanted]


def test_a_training_arrives_with_the_name_step_and_value_of_each_scalar_once(reader, run):
    histories, runs = run("train")
    names = ("loss", "learning_rate", "grad_norm", "eval_loss")
    assert len(points_of(reader, histories[0], *names)) == 3 * 6 + 3
    check_points(reader, runs[0], points_of(reader, histories[0], *names))


def test_an_evaluation_and_a_prediction_after_a_training_belong_to_its_run(reader, run):
    histories, runs = run("train")
    expected = points_of(reader, histories[0], "eval_later_loss", "test_loss")
    assert len(expected) == 2
    check_points(reader, runs[0], [] if "later lines" in reader.lacks else expected)


def test_a_second_trainer_in_a_process_has_a_run_of_its_own(reader, run):
    histories, runs = run("train")
    if "runs" in reader.lacks:
        assert len(runs) == 1
        return
    assert len(runs) == 2
    check_points(reader, runs[1], points_of(reader, histories[1], "loss", "learning_rate", "eval_loss"))
    if "names" not in reader.lacks:
        assert ["first" in str(runs[0].name), "second" in str(runs[1].name)] == [True, True]


def test_a_training_that_came_to_its_end_is_finished(reader, run):
    _, runs = run("train")
    assert [stored_run.status for stored_run in runs] == statuses(reader, "finished", "finished")[: len(runs)]


def test_the_arguments_and_the_configuration_of_the_model_arrive(reader, run):
    _, runs = run("train")
    values = {name.rpartition("/")[2]: str(value) for name, value in runs[0].parameters.items()}
    if "parameters" in reader.lacks:
        assert values == {}
        return
    assert values["max_steps"] == "6" and values["hidden_size"] == str(scenarios.HIDDEN_SIZE)
    assert float(values["learning_rate"]) == 0.01


def test_the_model_arrives_as_an_artifact(reader, run):
    _, runs = run("train")
    if "artifacts" in reader.lacks:
        assert runs[0].artifacts == {}
        return
    files = [Path(file).name for files in runs[0].artifacts.values() for file in files]
    assert "model.safetensors" in files and "config.json" in files


def test_no_tracker_receives_a_token(reader, run, tmp_path_factory):
    run("train")
    written = scenarios.folder_bytes(tmp_path_factory.getbasetemp() / "trackers" / reader.name / "train")
    assert scenarios.SECRET.encode() not in written


def test_a_training_that_fails_is_failed_and_one_that_is_stopped_is_killed(reader, run):
    _, runs = run("ended")
    if "runs" in reader.lacks:
        assert len(runs) == 1
        return
    assert [stored_run.status for stored_run in runs] == statuses(reader, "failed", "killed", "killed")


def test_a_training_resumed_after_a_crash_continues_its_run_with_no_point_twice_or_missing(reader, run):
    history, runs = run("resumed")
    expected = points_of(reader, history, "loss", "learning_rate", "eval_loss")
    assert len(expected) == 2 * 6 + 3
    if "resume" not in reader.lacks:
        assert len(runs) == 1
        check_points(reader, runs[0], expected)
        assert [runs[0].status] == statuses(reader, "finished")
    else:  # from the step of the checkpoint on; what the crashed process had sent may be there or not
        late = [line for line in history if line["step"] > 2]
        scalars = {
            name: [(step, value) for step, value in points if step is None or step > 2]
            for name, points in runs[-1].scalars.items()
        }
        check_points(
            reader, replace(runs[-1], scalars=scalars), points_of(reader, late, "loss", "learning_rate", "eval_loss")
        )


def test_the_trials_of_a_search_are_runs_of_their_own_with_names_and_a_group(reader, run):
    rates, runs = run("search")
    if "runs" in reader.lacks:
        assert len(runs) == 1
        return
    trials = [stored_run for stored_run in runs if stored_run.scalars or "scalars" in reader.lacks]
    assert len(trials) == len(rates) == 2
    assert [trial.status for trial in trials] == statuses(reader, "finished", "finished")
    if "parameters" not in reader.lacks:
        found = [
            {name.rpartition("/")[2]: value for name, value in trial.parameters.items()}["learning_rate"]
            for trial in trials
        ]
        assert [float(rate) for rate in found] == pytest.approx(rates)
    if "names" not in reader.lacks:
        assert len({trial.name for trial in trials}) == 2 and all("sweep" in str(trial.name) for trial in trials)
    groups = {trial.group for trial in trials}
    assert groups == {None} if "group" in reader.lacks else len(groups) == 1 and groups != {None}


def test_odd_names_and_values_end_no_training_and_cost_no_other_value(reader, run):
    history, runs = run("odd_values")
    check_points(reader, runs[0], points_of(reader, history, "loss", "plain"))


def test_what_is_kept_of_odd_names_and_values_is_what_the_page_says(reader, run):
    if not (odd_values.WRITES or odd_values.is_of_this_release(reader)):
        pytest.skip("the page tells of another release, or not of this tracker: TRAINWRIGHT_WRITE_ODD_VALUES=1")
    _, runs = run("odd_values")
    odd_values.check(reader, runs[0])


def test_a_tracker_adds_nothing_to_a_step_between_two_log_lines(reader, tmp_path):
    without, with_tracker = program(reader, tmp_path, lambda: scenarios.cost(reader))
    assert min(without) > 0
    assert all(ours <= bare + reader.calls_per_step * 40 for ours, bare in zip(with_tracker, without))
