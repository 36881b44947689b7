"""Engines that are packages of their own: `make test-engines` installs them; without them these tests are skipped.

Owns: skipping, and the results of a module's scenarios with and without an engine. Leaves to others: starting processes
(`tests/shared/torchrun.py`), and what they do, which is the function `scenarios(folder)` of the module that asks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchrun import run
from trainwright.interop.optional import is_installed

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not is_installed("deepspeed"):
        reason = "the package deepspeed is not installed: `make test-engines` installs it and runs these tests"
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the scenarios of the module gave back in each of two processes."""
    return run(request.path.stem, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What they give back in one process, without an engine."""
    return request.module.scenarios(tmp_path_factory.mktemp("one"))
