"""Scales and lines of a drawn panel."""

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from trainwright.report.history import Curve, Panel
from trainwright.report.svg import BOTTOM, HEIGHT, LEFT, MAX_DOTS, RIGHT, TOP, WIDTH, panel_svg, ticks


def points_of(svg: str) -> list[tuple[float, float]]:
    line = ElementTree.fromstring(svg).find("polyline")
    assert line is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_the_line_spans_the_drawing_and_larger_values_are_higher() -> None:
    points = points_of(panel_svg(Panel("Loss", [Curve("loss", [0, 5, 10], [1.0, 3.0, 2.0])]), 0, 10))
    assert [x for x, _ in points] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    lowest, highest, middle = (y for _, y in points)
    assert TOP < highest < middle < lowest < HEIGHT - BOTTOM
    assert middle == pytest.approx((lowest + highest) / 2, abs=0.1)


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [0.0, 0.0], [-3.0, 5.0], [1e-9, 2e-9], [1e30, 3e30]])
def test_any_values_stay_inside_the_drawing(values: list[float]) -> None:
    steps = list(range(7, 7 + len(values)))
    points = points_of(panel_svg(Panel("Loss", [Curve("loss", steps, values)]), steps[0], steps[-1]))
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in points)


def test_few_points_get_dots_with_their_values_and_many_do_not() -> None:
    few = panel_svg(Panel("Loss", [Curve("eval_loss", [1, 2], [0.5, 0.25])]), 1, 2)
    assert re.findall(r"<title>(.*?)</title>", few) == [
        "Validation loss 0.5 at step 1",
        "Validation loss 0.25 at step 2",
    ]
    steps = list(range(MAX_DOTS + 1))
    assert "<circle" not in panel_svg(Panel("Loss", [Curve("loss", steps, [float(s) for s in steps])]), 0, MAX_DOTS)


def test_ticks_are_round_numbers_inside_the_range() -> None:
    for low, high in ((0, 1), (0.013, 0.9), (-5, 17), (1e-6, 5e-5), (100, 123456)):
        found = ticks(low, high, 5)
        distances = [after - before for before, after in pairwise(found)]
        assert 2 <= len(found) <= 7 and low <= found[0] and found[-1] <= high * (1 + 1e-12)
        assert max(distances) == pytest.approx(min(distances))
        assert f"{distances[0]:.1e}"[0] in "125"
