"""Averaged weights, checkpointed activations and half-width evaluation in two processes; what one alone can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

DECAY = 0.75


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = nn.Linear(3, 3), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.tanh(self.inner(x)))  # type: ignore[no-any-return]


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        prediction = self.head(x)
        loss = {} if labels is None else {"loss": (prediction - labels).pow(2).mean()}
        return {**loss, "logits": prediction}


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": x, "labels": x.sum(0, keepdim=True)} for x in torch.randn(32, 3, generator=generator)]


def run(folder: Path, resume: str | None = None, **arguments: Any) -> Any:
    from trainwright import Trainer, TrainingArguments

    values = {"max_steps": 4, "learning_rate": 0.05, "logging_steps": 1, "per_device_train_batch_size": 4}
    args = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **{**values, "save_strategy": "no", **arguments}
    )
    trainer = Trainer(Deep(), args, train_dataset=data(), eval_dataset=data())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def scenarios(folder: Path) -> dict[str, Any]:
    saving = {"ema_decay": DECAY, "save_strategy": "steps", "save_steps": 1}
    averaging = run(folder / "ema", **saving)
    plain = run(folder / "plain")
    found = {"trained": weights(averaging), "plain": weights(plain)}
    with averaging.averaged_weights():
        found["average"] = weights(averaging)
    resumed = run(folder / "resumed", str(folder / "ema" / "checkpoint-2"), **saving)
    with resumed.averaged_weights():
        found["resumed"] = weights(resumed)
    found["checkpointed"] = weights(run(folder / "checkpointed", gradient_checkpointing=True))
    halved = run(folder / "halved", bf16_full_eval=True)
    found["losses"] = [halved.evaluate()["eval_loss"], plain.evaluate()["eval_loss"]]
    found["after"] = weights(halved)
    try:
        run(folder / "backward", optimizer_in_backward=True, max_grad_norm=0.0)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_every_process_holds_the_average_that_the_formula_gives(two: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    average = dict(Deep().state_dict())
    for step in range(1, 5):
        checkpoint = folder / "ema" / f"checkpoint-{step}"
        trained = load_file(checkpoint / "model.safetensors")
        average = {name: torch.lerp(value, trained[name], 1 - DECAY) for name, value in average.items()}
        assert_equal(load_file(checkpoint / "ema.safetensors"), average)
    for rank in two:
        assert_equal(rank["average"], average)
        assert_equal(rank["resumed"], average)
        assert_equal(rank["trained"], rank["plain"])


def test_checkpointed_blocks_give_the_same_weights_in_two_processes(two: Any) -> None:
    for rank in two:
        assert_equal(rank["checkpointed"], rank["plain"])


def test_half_width_weights_are_put_back_in_every_process(two: Any) -> None:
    for rank in two:
        assert_equal(rank["after"], rank["plain"])
        assert (
            rank["losses"][0] == pytest.approx(rank["losses"][1], rel=0.05) and rank["losses"][0] != rank["losses"][1]
        )


def test_an_update_in_the_backward_pass_is_refused_where_gradients_are_exchanged(two: Any) -> None:
    for rank in two:
        assert "works in one process on one device; with several processes" in rank["refused"]
