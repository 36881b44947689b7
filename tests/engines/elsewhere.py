"""Runs of `test_deepspeed_checkpoints` resumed by another number of processes; each has a checkpoint in `folder`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from test_deepspeed_checkpoints import resumed

from regression import zero


def scenarios(folder: Path) -> dict[int, Any]:
    return {
        stage: resumed(
            folder / f"out{stage}", folder / f"plain{stage}" / "checkpoint-3", zero(stage), 0.0, save_strategy="no"
        )
        for stage in (1, 2, 3)
    }
