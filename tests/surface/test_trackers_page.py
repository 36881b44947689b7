"""`docs/trackers.md` says what the registry, the callbacks and the tests of the trackers say."""

import importlib.util
from pathlib import Path

import pytest

from trainwright.interop.trackers import TRACKERS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_trackers", DOCS / "generate_trackers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_script_writes(generator):
    assert (DOCS / "trackers.md").read_text(encoding="utf-8") == generator.page(), "run `make docs`"


def test_every_tracker_has_its_section_and_every_variable_of_a_callback_its_row():
    page = (DOCS / "trackers.md").read_text(encoding="utf-8")
    sections = page.split("\n## `")[1:]
    assert [section.partition("`")[0] for section in sections] == list(TRACKERS)
    by_name = dict(zip(TRACKERS, sections))
    for name, variable in (
        ("comet_ml", "COMET_EXPERIMENT_KEY"),
        ("wandb", "WANDB_LOG_MODEL"),
        ("mlflow", "MLFLOW_TAGS"),
    ):
        assert f"| `{variable}` |" in by_name[name]
