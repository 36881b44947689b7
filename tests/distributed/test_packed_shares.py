"""Two processes share out the packs, and learn from them what one process does with the same global batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.slow

GLOBAL_BATCH, PACK = 4, 16  # packs per micro-batch over all processes; tokens per pack
LENGTHS = [5, 9, 3, 12, 7, 2, 16, 4, 8, 1, 6, 11, 10, 14, 13, 15] * 2  # fill 17 packs


class Model(nn.Module):
    """Predicts the next token from the mean of those of its sample so far; notes the rows it was given."""

    accepts_loss_kwargs = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
        self.seen: list[tuple[int, ...]] = []

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, seq_idx: torch.Tensor, num_items_in_batch: Any = None
    ) -> dict[str, Any]:
        if self.training:  # not what is tried before the first step
            self.seen += map(tuple, input_ids.tolist())
        same = (seq_idx[:, :, None] == seq_idx[:, None, :]).tril().float()  # (packs, length, length)
        logits = self.head(same @ self.embed(input_ids) / same.sum(-1, keepdim=True))
        kind = "mean" if num_items_in_batch is None else "sum"
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=kind)
        return {"loss": loss if num_items_in_batch is None else loss / num_items_in_batch, "logits": logits}


def train(output_dir: Path, **arguments: Any) -> dict[str, Any]:
    from trainwright import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(1, 64, (length,), generator=generator)} for length in LENGTHS]
    args = TrainingArguments(
        str(output_dir),
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        packing=True,
        packing_length=PACK,
        dataloader_drop_last=True,  # so that no pack is given out twice to fill the last round
        num_train_epochs=2,
        optim="sgd",
        learning_rate=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    trainer = Trainer(Model(), args, train_dataset=data)
    trainer.train()
    return {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "weights": [parameter.detach().clone() for parameter in trainer.model.parameters()],
        "seen": trainer.model.seen,
    }


def evaluate(output_dir: Path) -> dict[str, Any]:
    """The loss of all samples, which fill 17 packs, so that the last round of two processes repeats one."""
    from trainwright import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(1, 64, (length,), generator=generator)} for length in LENGTHS]
    args = TrainingArguments(str(output_dir), packing=True, packing_length=PACK, report_to="none", use_cpu=True)
    trainer = Trainer(Model(), args, eval_dataset=data)
    found = trainer.evaluate()["eval_loss"]
    return {"loss": found, "again": trainer.evaluate()["eval_loss"], "rows": len(trainer.predict(data).predictions)}


def scenarios(folder: Path) -> dict[str, Any]:
    found = {str(number): train(folder, gradient_accumulation_steps=number) for number in (1, 2)}
    return {**found, "evaluated": evaluate(folder)}


def test_two_processes_have_the_evaluation_loss_of_one_without_repeated_packs(one, two):
    for of_rank in two:
        assert of_rank["evaluated"]["loss"] == pytest.approx(one["evaluated"]["loss"], rel=1e-6)
        assert of_rank["evaluated"]["again"] == of_rank["evaluated"]["loss"]
        assert of_rank["evaluated"]["rows"] == one["evaluated"]["rows"] == len(LENGTHS)


@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_two_processes_learn_from_packs_what_one_does(one, two, accumulation):
    one, two = one[accumulation], [of_rank[accumulation] for of_rank in two]
    assert two[0]["losses"] == pytest.approx(one["losses"], abs=1e-5)
    for weight, first, second in zip(one["weights"], two[0]["weights"], two[1]["weights"]):
        assert torch.equal(first, second)
        assert torch.allclose(first, weight, atol=1e-5)


@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_each_pack_goes_to_one_process(one, two, accumulation):
    one, two = one[accumulation], [of_rank[accumulation] for of_rank in two]
    assert len(one["seen"]) == 2 * 16  # of 17 packs the last one of each epoch is dropped
    assert sorted(two[0]["seen"] + two[1]["seen"]) == sorted(one["seen"])
    for epoch in (slice(0, 8), slice(8, 16)):
        assert not set(two[0]["seen"][epoch]) & set(two[1]["seen"][epoch])
