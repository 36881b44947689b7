"""What tests read off a run that is over. This directory is on the path of every test (`pythonpath` in pyproject)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two models' weights are the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def eval_steps(trainer: Any, key: str = "eval_loss") -> list[int]:
    """Steps whose log line has `key`."""
    return [line["step"] for line in trainer.state.log_history if key in line]


def checkpoints(trainer: Any) -> list[int]:
    """Steps of the checkpoints on the disk."""
    return sorted(int(path.name.split("-")[1]) for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


def weights_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")  # type: ignore[no-any-return]


def benchmark_module(name: str) -> ModuleType:
    sys.path.insert(0, BENCHMARKS)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(BENCHMARKS)
