"""Small models and data that tests share. Everything is seeded and made here; nothing is downloaded."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainwright.interop.optional import installed_version

sys.path.insert(0, str(Path(__file__).parent / "shared"))  # for scripts that load this file without pytest

from line import LineData, LineModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

# The peft that goes with transformers 4.55 imports names that today's torchao no longer has: hide torchao from it.
if (installed_version("transformers") or (5,)) < (5,):
    sys.modules["torchao"] = None  # type: ignore[assignment]


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end; a full collection that visits it takes a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """The same for what the tests of a module imported."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """A Trainer sets the level of the package's logger, which must not reach the next test."""
    package = logging.getLogger("trainwright")
    level = package.level
    yield
    package.setLevel(level)


@pytest.fixture
def line_data() -> type[LineData]:
    return LineData


@pytest.fixture
def line_model() -> type[LineModel]:
    return LineModel


@pytest.fixture
def make_trainer(tmp_path: Any) -> Any:
    """Build a Trainer on the line data: `make_trainer(max_steps=3)`.

    `trainer={...}` goes to Trainer, the rest to the arguments.
    """
    from trainwright import Trainer, TrainingArguments

    def make(trainer: dict[str, Any] | None = None, cls: type = Trainer, **arguments: Any) -> Any:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "learning_rate": 0.1,
            "logging_steps": 1,
        }
        values.update(arguments)
        given: dict[str, Any] = {"model": LineModel(), "train_dataset": LineData(), "eval_dataset": LineData(9, seed=5)}
        given.update(trainer or {})
        if "model_init" in given:
            given.pop("model")
        return cls(args=TrainingArguments(**values), **given)

    return make
