"""Two gloo processes through accelerate evaluate to what one process does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from trainwright.evaluation.accumulator import LoopSettings
from trainwright.evaluation.run import Evaluation
from trainwright.names import IGNORE_INDEX
from trainwright.parallel.strategy import Strategy

NUM_SAMPLES = 11  # of two processes and batches of 2, the last is partly repeated samples


def samples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (NUM_SAMPLES, 6), generator=generator)
    return [{"tokens": row, "labels": row.roll(1), "length": torch.tensor(2 + i % 5)} for i, row in enumerate(tokens)]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Batches as long as their longest sample, so that processes differ in width."""
    width = max(int(row["length"]) for row in rows)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    for index, row in enumerate(rows):
        labels[index, : row["length"]] = row["labels"][: row["length"]]
    return {"tokens": torch.stack([row["tokens"][:width] for row in rows]), "labels": labels}


TABLE = torch.randn(9, 9, generator=torch.Generator().manual_seed(1))


def predict(inputs: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    logits = TABLE[inputs["tokens"]]  # (batch, seq, class)
    return cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten()), logits, inputs["labels"]


class Together(Strategy):
    """Processes that gather through accelerate, and predict repeated samples with the others."""

    is_distributed = True

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator.device)
        self.gather_for_metrics = accelerator.gather_for_metrics  # type: ignore[method-assign]
        self.pad_across_processes = accelerator.pad_across_processes  # type: ignore[method-assign]


ALONE = Strategy(torch.device("cpu"))


def evaluate(
    dataloader: Any, strategy: Strategy = ALONE, batch_metrics: bool = False, **options: Any
) -> dict[str, Any]:
    seen: list[Any] = []

    def metrics(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        seen.append([len(element) for element in prediction])
        return {}

    settings = LoopSettings(include_losses=True, batch_metrics=batch_metrics)
    output = Evaluation().run(dataloader, settings, predict, strategy, compute_metrics=metrics, **options)
    assert output.metrics is not None
    return {
        "logits": output.predictions,
        "labels": output.label_ids,
        "loss": output.metrics["eval_loss"],
        "num_samples": output.num_samples,
        "seen": seen,
    }


def on_each_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from accelerate import Accelerator

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    dataloader = accelerator.prepare(DataLoader(samples(), batch_size=2, collate_fn=collate))  # type: ignore[arg-type]
    strategy = Together(accelerator)
    results = [evaluate(dataloader, strategy), evaluate(dataloader, strategy, num_samples=NUM_SAMPLES)]
    results.append(evaluate(dataloader, strategy, batch_metrics=True))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_rows_and_the_loss_of_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    mp.spawn(on_each_rank, args=(str(tmp_path),), nprocs=2)
    alone = evaluate(DataLoader(samples(), batch_size=2, collate_fn=collate))  # type: ignore[arg-type]
    for rank in range(2):
        counted, known, per_batch = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for together in (counted, known):
            assert together["num_samples"] == NUM_SAMPLES and together["seen"] == [[NUM_SAMPLES] * 3]
            assert np.array_equal(together["labels"], alone["labels"])
            assert np.array_equal(together["logits"], alone["logits"])
            # The repeated samples of the last batch are in its mean loss and in no count.
            assert together["loss"] == pytest.approx(alone["loss"], rel=0.05)
        assert per_batch["num_samples"] == NUM_SAMPLES
        assert per_batch["seen"] == [[4] * 3, [4] * 3, [3] * 3]
