"""Speeds and the time breakdown in the report."""

import re

import pytest

from trainwright.profiling.phases import PHASES
from trainwright.report.history import panels_of, time_of_phases
from trainwright.report.html import write_report
from trainwright.report.palette import DARK, LIGHT
from trainwright.report.svg import WIDTH


def line(step, data, forward, **more):
    return {**more, "time_data_s": data, "time_forward_s": forward, "time_saving_s": 0.0, "step": step}


LINES = [
    line(1, data=1.0, forward=2.0, loss=2.0, samples_per_second=10.0, mfu=0.4),
    line(2, data=1.0, forward=3.0, loss=1.0, samples_per_second=20.0, mfu=0.5),
]
LAST = {
    "train_runtime": 8.0,
    "train_time_data_s": 2.0,
    "train_time_forward_s": 6.0,
    "train_time_saving_s": 0.0,
    "step": 2,
}


def test_the_time_of_a_run_is_that_of_its_last_line_else_the_sum_of_its_lines():
    assert time_of_phases([*LINES, LAST]) == {"forward": 6.0, "data": 2.0}
    assert time_of_phases(LINES) == {"forward": 5.0, "data": 2.0}
    assert time_of_phases([{"loss": 1.0, "step": 1}]) == {}


def test_speeds_and_the_time_of_each_part_have_panels():
    panels = {panel.title: [curve.name for curve in panel.curves] for panel in panels_of([*LINES, LAST])}
    assert panels["Samples per second"] == ["samples_per_second"]
    assert panels["Share of the device's peak (MFU)"] == ["mfu"]
    assert panels["Seconds between two log lines"] == ["time_forward_s", "time_data_s"]


def test_the_report_shows_a_bar_cut_in_proportion_to_the_time(tmp_path):
    page = write_report(tmp_path, [*LINES, LAST], {}).read_text()
    bar = page.partition("<h2>Where the time went</h2>")[2].partition("</figure>")[0]
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([0-9.]+)"', bar)]
    assert widths == pytest.approx([0.75 * WIDTH, 0.25 * WIDTH], abs=0.01)
    assert "forward 75.0% (6 s)" in bar and "data 25.0% (2 s)" in bar


def test_the_colours_of_all_phases_are_distinct_and_those_of_the_bar(tmp_path):
    seconds = {f"time_{phase}_s": float(index + 1) for index, phase in enumerate(PHASES)}
    page = write_report(tmp_path, [{**seconds, "step": 1}], {}).read_text()
    bar = page.partition("<h2>Where the time went</h2>")[2].partition("</figure>")[0]
    pieces, keys = re.findall(r'<rect [^>]*fill="(.*?)"', bar), re.findall(r'--c: (.*?)"', bar)
    assert pieces == keys and len(set(keys)) == len(PHASES) and "opacity" not in bar
    for palette in (LIGHT, DARK):
        assert len(set(palette)) == len(palette) >= len(PHASES)


def test_throughput_is_drawn_once_however_many_measures_of_it_were_logged():
    lines = [{"step": 1, "samples_per_second": 1.0, "steps_per_second": 2.0, "tokens_per_second": 3.0, "mfu": 0.5}]
    titles = [panel.title for panel in panels_of(lines)]
    assert titles == ["Tokens per second", "Share of the device's peak (MFU)"]


def test_a_run_without_a_breakdown_has_no_empty_heading(tmp_path):
    assert "Where the time went" not in write_report(tmp_path, [{"loss": 1.0, "step": 1}], {}).read_text()
