"""Runs over each other."""

import json
import re

import pytest

from trainwright.cli import main
from trainwright.report.compare import differences, panels_of_runs, read_runs, results


def make(folder, values, about=None, **more):
    folder.mkdir(parents=True)
    lines = [{"step": step, "run_id": "a", "time": 10.0 + step, "loss": value} for step, value in enumerate(values, 1)]
    lines[0].update({"about_run": about} if about else {}, **more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def about(**settings):
    return {"model": "Linear", "seed": 1, "settings": settings, "versions": {"torch": "9"}, "max_steps": 3}


@pytest.fixture
def two(tmp_path):
    first = make(tmp_path / "a", [3.0, 2.0, 1.0], about(learning_rate=0.5, optim="sgd"))
    second = make(tmp_path / "b", [4.0, 3.0], {**about(optim="sgd", bf16=True), "seed": 2}, eval_f1=0.5)
    return [first, second]


def test_settings_are_named_where_they_differ_with_the_value_of_each_run(two):
    header, *rows = differences(read_runs(two))
    assert header == ["", "a", "b"]
    assert sorted(rows) == [["bf16", "(default)", "yes"], ["learning_rate", "0.5", "(default)"], ["seed", "1", "2"]]


def test_a_run_that_recorded_nothing_of_itself_is_not_said_to_have_defaults(two, tmp_path):
    runs = read_runs([two[0], make(tmp_path / "old", [1.0])])
    assert ["learning_rate", "0.5", "?"] in differences(runs)


def test_each_value_has_a_panel_in_which_a_run_keeps_its_place(two):
    panels = {panel.title: [(one.name, one.values) for one in panel.curves] for panel in panels_of_runs(read_runs(two))}
    assert panels["Training loss"] == [("a", [3.0, 2.0, 1.0]), ("b", [4.0, 3.0])]
    assert panels["F1"] == [("a", []), ("b", [0.5])]


def test_a_run_has_the_same_colour_in_key_drawing_and_script(two, tmp_path):
    page = tmp_path / "c.html"
    assert main(["compare", *two, "--output", str(page)]) == 0
    text = page.read_text()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])
    assert {curve["color"] for panel in data for curve in panel["curves"] if curve["name"] == "b"} == {1}
    figure = text.partition("<figcaption>F1</figcaption>")[2].partition("</figure>")[0]
    keys, drawn = re.findall(r'--c: (.*?)"', figure), re.findall(r'<polyline [^>]*stroke="(.*?)"', figure)
    assert keys == drawn == ["var(--c0)", "var(--c1)"]


def test_the_command_prints_results_and_differences_and_names_the_page(two, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *two]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"learning_rate +0\.5 +\(default\)", printed) and printed.splitlines()[-1] == "comparison.html"
    assert [row[:2] for row in results(read_runs(two))[1:]] == [["a", "3 of 3"], ["b", "2 of 3"]]
    text = (tmp_path / "comparison.html").read_text()
    assert "(default)" in text and "Training loss" in text


def test_runs_of_the_same_name_are_named_by_more_of_their_paths(tmp_path):
    paths = [make(tmp_path / name / "run", [1.0]) for name in ("one", "two")]
    assert [run.name for run in read_runs(paths)] == ["one/run", "two/run"]
    assert [run.name for run in read_runs([paths[0], paths[0]])] == ["run", "run"]


@pytest.mark.parametrize("kind", ["absent", "empty"])
def test_what_is_no_run_is_named(two, tmp_path, capsys, kind):
    other = tmp_path / kind
    if kind == "empty":
        other.mkdir()
    assert main(["compare", two[0], str(other), "--output", str(tmp_path / "c.html")]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and str(other) in captured.err and not (tmp_path / "c.html").exists()
