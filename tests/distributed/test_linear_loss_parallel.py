"""`linear_cross_entropy` in two processes: DDP and FSDP2 train to what one process does with logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_fsdp import Tiny, make, samples

from blocks import num_processes

CLASSES = 31


class Named(Tiny):
    """Names its head, as `linear_cross_entropy` asks of a plain module."""

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


def data() -> list[dict[str, torch.Tensor]]:
    """The first two labels of each row, and most of every fourth row's, are left out."""
    rows = samples()
    for number, row in enumerate(rows):
        row["labels"][: 4 if number % 4 == 0 else 2] = -100
    return rows


def trained(folder: Path, setting: Any = True, **given: Any) -> dict[str, Any]:
    trainer = make(
        folder, Named(), data=data(), linear_cross_entropy=setting, eval_strategy="steps", eval_steps=2, **given
    )
    trainer.train()
    weights = {
        name: (one.full_tensor() if hasattr(one, "full_tensor") else one).detach().clone()
        for name, one in trainer.model.state_dict().items()
    }
    log = trainer.state.log_history
    return {
        "losses": [line["loss"] for line in log if "loss" in line],
        "eval_losses": [line["eval_loss"] for line in log if "eval_loss" in line],
        "is_used": trainer._linear_loss is not None and trainer._linear_loss.is_checked,
        "weights": weights,
    }


def scenarios(folder: Path) -> dict[str, Any]:
    given = {"optim": "sgd", "learning_rate": 0.1}
    found = {
        "ddp": trained(folder / "ddp", fsdp="", **given),
        "fsdp": trained(folder / "fsdp", **given),
        "fsdp freed": trained(folder / "freed", gradient_accumulation_steps=2, **given),
    }
    if num_processes() == 1:
        logits = trained(folder / "logits", False, **given)
        accumulated = trained(folder / "accumulated", False, gradient_accumulation_steps=2, **given)
        found = {"ddp": logits, "fsdp": logits, "fsdp freed": accumulated}
    return found


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp freed"])
def test_two_processes_train_without_logits_to_what_one_does_with_them(two: Any, one: Any, name: str) -> None:
    for rank in two:
        assert rank[name]["is_used"]
        assert rank[name]["losses"] == pytest.approx(one[name]["losses"], rel=1e-4)
        for key, weight in one[name]["weights"].items():
            assert torch.allclose(rank[name]["weights"][key], weight, rtol=1e-4, atol=1e-5), key
