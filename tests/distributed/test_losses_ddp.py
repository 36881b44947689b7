"""Two processes weigh their micro-batches by items, take part without any, and know whether they train or evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainwright import Trainer, TrainerCallback, TrainingArguments


class Tags(nn.Module):
    """Tags each token; its loss is the mean over labels that are not -100, and it takes no item count."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.dropout, self.head = nn.Embedding(32, 8), nn.Dropout(dropout), nn.Linear(8, 5)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.dropout(self.embed(input_ids)))  # (batch, seq, 5)
        outputs = {"logits": logits}
        if labels is not None:
            outputs["loss"] = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return outputs


def tagged(num: int, empty: tuple[int, ...] = ()) -> list[dict[str, torch.Tensor]]:
    """Rows of 6 tokens, of which a growing share of labels is ignored; all of them in the rows `empty`."""
    rows = []
    for index in range(num):
        ids = (torch.arange(6) * (index + 3)) % 32
        labels = ids % 5
        labels[6 - index % 6 :] = -100
        rows.append({"input_ids": ids, "labels": torch.full_like(labels, -100) if index in empty else labels})
    return rows


def trained(folder: Path, name: str, rows: Any, model: nn.Module | None = None, **arguments: Any) -> dict[str, Any]:
    """A micro-batch of two rows in each of two processes is one of four in one process."""
    import os

    here = int(os.environ.get("WORLD_SIZE", "1"))
    values = {
        "per_device_train_batch_size": 4 // here, "gradient_accumulation_steps": 2, "num_train_epochs": 1.0,
        "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.5, "logging_steps": 1,
        "max_grad_norm": 1.0, "save_strategy": "no", "lr_scheduler_type": "constant", **arguments,
    }  # fmt: skip
    args = TrainingArguments(str(folder / name), report_to="none", use_cpu=True, disable_tqdm=True, **values)
    modes: list[bool] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            modes.append(model.training)

    trainer = Trainer(model or Tags(), args, train_dataset=rows, eval_dataset=rows[:4], callbacks=[Watch()])
    trainer.train()
    lines = trainer.state.log_history
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "norms": [line["grad_norm"] for line in lines if "grad_norm" in line],
        "weights": {key: value.clone() for key, value in trainer.model.state_dict().items()},
        "modes": modes,
    }


# Rows in the order of the data; two go to each process in turn, so 2, 3 are the second one's first micro-batch.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "weighed": ((), {}),
    "without accumulation": ((), {"gradient_accumulation_steps": 1}),
    "empty in one process": ((2, 3), {}),
    "empty in one process, without accumulation": ((2, 3), {"gradient_accumulation_steps": 1}),
    "update empty in one process": ((2, 3, 6, 7), {}),
    "update empty": (tuple(range(8)), {"weight_decay": 0.1}),
    "update empty, smoothed": (tuple(range(8)), {"weight_decay": 0.1, "label_smoothing_factor": 0.1}),
    "empty, found batch size": ((2, 3), {"auto_find_batch_size": True}),
}


def scenarios(folder: Path) -> dict[str, Any]:
    results = {name: trained(folder, name, tagged(16, empty), **more) for name, (empty, more) in CASES.items()}
    results["evaluated"] = trained(
        folder, "evaluated", tagged(16), Tags(dropout=0.5), eval_strategy="steps", eval_steps=1
    )
    return results


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_from_labels_what_one_does(two: list[Any], one: Any, name: str) -> None:
    expected = one[name]
    for process in two:
        found = process[name]
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), equal_nan=True)
        torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(expected["norms"]))
        for key, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=1e-6)


def test_an_update_without_labels_in_any_process_is_left_out(one: Any) -> None:
    first, second = one["update empty"]["losses"]
    assert first != first and second == second  # NaN: there is no loss to show


def test_replicas_train_again_after_an_evaluation(two: list[Any], one: Any) -> None:
    assert one["evaluated"]["modes"] == two[0]["evaluated"]["modes"] == two[1]["evaluated"]["modes"] == [True, True]
