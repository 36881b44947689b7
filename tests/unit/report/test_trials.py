"""The trials of a search as a table, a CSV file and a page."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from trainwright.report.search_page import write_search_page
from trainwright.report.trials import MAX_ROWS, TrialRecord, text_table, write_csv

TRIALS = [
    TrialRecord("0", "complete", (0.5,), {"learning_rate": 1e-5, "optim": "sgd"}, 2.0),
    TrialRecord("1", "failed", (), {"learning_rate": 1e-1, "optim": "sgd"}, 1.0),
    TrialRecord("2", "complete", (0.25,), {"learning_rate": 1e-2, "warmup_steps": 3}, 3.0),
]


def test_the_file_has_every_trial_in_order_and_no_value_where_there_is_none(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "new", TRIALS, ["minimize"])
    assert path == tmp_path / "new" / "search_trials.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert [row["objective"] for row in rows] == ["0.5", "", "0.25"]
    assert [row["warmup_steps"] for row in rows] == ["", "", "3"]
    assert [float(row["learning_rate"]) for row in rows] == [1e-5, 1e-1, 1e-2]


def test_the_text_names_the_best_first_in_either_direction_and_failed_trials_last() -> None:
    order = {
        direction: [line.split()[0] for line in text_table(TRIALS, [direction]).splitlines()[1:]]
        for direction in ("minimize", "maximize")
    }
    assert order == {"minimize": ["2", "0", "1"], "maximize": ["0", "2", "1"]}


def test_several_objectives_have_a_column_each() -> None:
    trials = [TrialRecord("0", "complete", (0.5, 0.75), {}, None)]
    header, row = (line.split() for line in text_table(trials, ["minimize", "maximize"]).splitlines())
    assert header == ["trial", "state", "objective_0", "objective_1", "duration_s"]
    assert row == ["0", "complete", "0.5", "0.75", "-"]


def test_a_long_search_is_cut_and_says_where_the_rest_is() -> None:
    trials = [TrialRecord(str(number), "complete", (float(number),), {}, 1.0) for number in range(MAX_ROWS + 7)]
    lines = text_table(trials, ["minimize"]).splitlines()
    assert len(lines) == 1 + MAX_ROWS + 1 and lines[-1] == "  and 7 more, in search_trials.csv"


def figures(page: str) -> dict[str, str]:
    """Caption -> drawing."""
    return dict(re.findall(r"<figure><figcaption>(.*?)</figcaption>(.*?)</figure>", page, re.DOTALL))


def test_the_page_draws_each_trial_the_best_so_far_and_each_hyper_parameter_that_varies(tmp_path: Path) -> None:
    page = write_search_page(tmp_path, TRIALS, ["minimize"]).read_text()
    drawn = figures(page)
    # warmup_steps has one value, optim is a text: neither has an axis.
    assert list(drawn) == ["objective (minimize)", "objective over learning_rate"]
    history = re.findall(r"<title>(.*?)</title>", drawn["objective (minimize)"])
    assert "Best so far 0.25 at trial 1" in history and "Each trial 0.5 at trial 0" in history
    dots = re.findall(r'cx="(.*?)".*?<title>(.*?)</title>', drawn["objective over learning_rate"])
    assert [text.partition(":")[0] for _, text in dots] == ["trial 0", "trial 2"]
    assert "<dt>failed</dt><dd>1</dd>" in page and "<dt>complete</dt><dd>2</dd>" in page


def test_a_hyper_parameter_over_several_magnitudes_has_a_logarithmic_axis(tmp_path: Path) -> None:
    def places(values: list[float]) -> list[float]:
        trials = [TrialRecord(str(i), "complete", (float(i),), {"x": value}) for i, value in enumerate(values)]
        page = write_search_page(tmp_path, trials, ["minimize"]).read_text()
        return [float(place) for place in re.findall(r'cx="(.*?)"', figures(page)["objective over x"])]

    left, middle, right = places([1e-4, 1e-3, 1e-2])
    assert abs((middle - left) - (right - middle)) < 0.2  # equal ratios, equal distances
    left, middle, right = places([1.0, 2.0, 3.0])
    assert abs((middle - left) - (right - middle)) < 0.2  # equal differences, equal distances


def test_a_page_without_complete_trials_says_so_and_escapes_what_it_shows(tmp_path: Path) -> None:
    page = write_search_page(tmp_path, [TrialRecord("<b>", "failed", (), {"a&b": "<i>"})], ["minimize"]).read_text()
    assert "No trial is complete." in page and "&lt;b&gt;" in page and "<i>" not in page and "a&amp;b" in page
