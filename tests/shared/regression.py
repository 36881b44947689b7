"""A small regression with two layers and a norm, for engines: the run, and what is compared of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blocks import num_processes

GLOBAL_BATCH = 8  # samples per micro-batch, over all processes


class Data(torch.utils.data.Dataset):
    """`length` samples of y = x[0] + x[1] plus noise."""

    def __init__(self, length: int = 64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, 8, generator=generator)
        self.y = self.x[:, :2].sum(1, keepdim=True) + 0.1 * torch.randn(length, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class Model(nn.Module):
    """`poison`: the forward pass, counted from 1, whose loss is NaN."""

    def __init__(self, poison: int = 0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)
        self.poison, self.num_passes = poison, 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        prediction = self.last(torch.tanh(self.norm(self.first(x))))  # (batch, 1)
        if labels is None:
            return {"logits": prediction}
        self.num_passes += self.training
        loss = ((prediction - labels) ** 2).mean()
        if self.training and self.num_passes == self.poison:
            loss = loss * float("nan")
        return {"loss": loss, "logits": prediction}


def zero(stage: int, **more: Any) -> dict[str, Any] | None:
    """DeepSpeed's configuration; None in one process, which is the reference. At stage 3 every weight is divided."""
    if num_processes() == 1 and "ALONE" not in os.environ:
        return None
    section = {"stage": stage, "stage3_param_persistence_threshold": 0, **more.pop("zero", {})}
    return {"zero_optimization": section, **more}


def make(folder: Path, config: Any, model: Any = None, **given: Any) -> Any:
    """A Trainer for four updates; `given` are arguments, `trainer` of it keyword arguments of the Trainer."""
    from trainwright import Trainer, TrainingArguments

    trainer = {"train_dataset": Data(), "eval_dataset": Data(20, seed=5), **given.pop("trainer", {})}
    cls = given.pop("cls", Trainer)
    values: dict[str, Any] = {
        "per_device_train_batch_size": GLOBAL_BATCH // num_processes(),
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        **given,
    }
    args = TrainingArguments(str(folder), report_to="none", disable_tqdm=True, deepspeed=config, **values)
    if "model_init" not in trainer:
        trainer["model"] = Model() if model is None else model
    return cls(args=args, **trainer)


def error_of(function: Any) -> str:
    """What `function()` raises, as text; "" where it returns."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Whole weights, in process 0; all processes call it."""
    whole = trainer._strategy.whole_weights(trainer.model)
    whole = trainer.model.state_dict() if whole is None else whole
    return {name: value.detach().clone() for name, value in whole.items()}


def result_of(trainer: Any) -> dict[str, Any]:
    history = trainer.state.log_history
    return {
        "losses": [line["loss"] for line in history if "loss" in line],
        "norms": [line["grad_norm"] for line in history if "grad_norm" in line],
        "rates": [line["learning_rate"] for line in history if "learning_rate" in line],
        "evaluations": [line["eval_loss"] for line in history if "eval_loss" in line],
        "steps": trainer.state.global_step,
        "weights": weights_of(trainer),
    }


def trained(folder: Path, config: Any, model: Any = None, **given: Any) -> dict[str, Any]:
    trainer = make(folder, config, model, **given)
    trainer.train()
    return result_of(trainer)
