"""`docs/optimizers.md` and its picture say what the code says, and what a step leaves behind."""

import importlib.util
from pathlib import Path

import pytest

from trainwright.names import SchedulerType
from trainwright.optim.registry import ROWS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_optimizers", DOCS / "generate_optimizers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written():
    """The column of bytes in the committed page, by the name of the optimizer."""
    lines = (DOCS / "optimizers.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| `") and "When to use it" not in line]
    return {row[0].removeprefix("| ").strip("`"): row[3] for row in rows}


def test_the_committed_page_is_what_the_script_writes(generator):
    here = {name: generator.as_text(value) for name, value in generator.measured().items()}
    assert {"adamw_torch", "sgd", "muon"} <= here.keys()
    # What cannot be measured here, for want of a package or a device, is taken from the page.
    assert (DOCS / "optimizers.md").read_text(encoding="utf-8") == generator.page(written() | here), "run `make docs`"


def test_the_committed_picture_is_what_the_script_draws(generator):
    assert (DOCS / "schedules.svg").read_text(encoding="utf-8") == generator.picture(), "run `make docs`"


def test_every_optimizer_and_every_schedule_has_its_place(generator):
    page = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    assert written().keys() == set(ROWS)
    unmeasured = {name for name, state in written().items() if state == generator.ABSENT}
    assert unmeasured == {name for name, row in ROWS.items() if row.device is not None}
    for kind in SchedulerType:
        section = page.partition(f"### `{kind.value}`")[2].partition("###")[0]
        formula = section.split("```")[1].strip()
        assert formula and "`get_" in section


def test_the_bytes_are_those_that_the_moments_have(generator):
    side, rank = generator.SIDE, 128
    adam = 2 * 4
    assert generator.bytes_per_parameter("adamw_torch") == pytest.approx(adam, abs=4 / side**2)
    assert generator.bytes_per_parameter("sgd") == 0
    assert generator.bytes_per_parameter("adafactor") == pytest.approx(2 * side * 4 / side**2, rel=0.01)
    pytest.importorskip("galore_torch")
    low = (rank * side + 2 * rank * side) * 4 / side**2  # a projection, and two moments of the projected gradient
    assert generator.bytes_per_parameter("galore_adamw") == pytest.approx(low, rel=0.01)
