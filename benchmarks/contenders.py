"""The loops that are compared, each as a user of it would write it, all doing the work of `toy`.

Owns: one function per loop, `run(collator, num_steps, cpu)`, and the table of them. Leaves to others: measuring.
Each imports its framework inside, so that one that is not installed is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch.utils.data import DataLoader

import toy

Run = Callable[[Any, int, bool], None]


@dataclass(frozen=True)
class Contender:
    """One column of the comparison."""

    name: str
    package: str  # what must be installed
    run: Run
    micro_batches: int = 1  # per step
    variant: str = ""  # what else is different about the work: compared with the bare loop of the same variant

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        return version(self.package)


def bare(accumulation: int = 1, bf16: bool = False, max_grad_norm: float = toy.MAX_GRAD_NORM) -> Run:
    """What a careful user writes without a framework: no progress bar, one read per log line."""

    def run(collator: Any, num_steps: int, cpu: bool) -> None:
        device = (None if cpu else torch.accelerator.current_accelerator(check_available=True)) or torch.device("cpu")
        model = toy.ToyModel().to(device)
        optimizer, schedule = toy.optimizer_and_schedule(model, num_steps)
        parameters = list(model.parameters())
        losses: list[torch.Tensor] = []
        model.train()
        for index, batch in enumerate(_loader(collator, num_steps * accumulation), start=1):
            if device.type != "cpu":
                batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            if bf16:
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    loss = model(**batch)["loss"]
            else:
                loss = model(**batch)["loss"]
            if accumulation > 1:
                loss = loss / accumulation
            loss.backward()
            losses.append(loss.detach())
            if index % accumulation != 0:
                continue
            norm = torch.zeros(())
            if max_grad_norm:
                norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step = index // accumulation
            if step % toy.LOGGING_STEPS == 0:
                print(step, torch.stack([torch.stack(losses).sum() / toy.LOGGING_STEPS, norm]).tolist())
                losses.clear()
            if step == num_steps:
                break

    return run


def with_accelerate(collator: Any, num_steps: int, cpu: bool) -> None:
    """The loop of accelerate's own guide."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a run before it may have chosen another device
    accelerator = Accelerator(cpu=cpu)
    model = toy.ToyModel()
    optimizer, schedule = toy.optimizer_and_schedule(model, num_steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, _loader(collator, num_steps), schedule)
    losses: list[torch.Tensor] = []
    model.train()
    for step, batch in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), toy.MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if step % toy.LOGGING_STEPS == 0:
            accelerator.print(step, torch.stack(losses).mean().item())
            losses.clear()
        if step == num_steps:
            break


def with_trainer(package: str, accumulation: int = 1, **more: Any) -> Run:
    """`Trainer` of `package`, ours or the reference, with its default callbacks, progress bar and `more` arguments."""

    def run(collator: Any, num_steps: int, cpu: bool) -> None:
        library = importlib.import_module(package)
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # transformers 4.55 leaves bf16 on for the trainers after it
        with tempfile.TemporaryDirectory() as directory:
            values: dict[str, Any] = {
                "output_dir": directory,
                "max_steps": num_steps,
                "per_device_train_batch_size": toy.BATCH_SIZE,
                "gradient_accumulation_steps": accumulation,
                "learning_rate": toy.LEARNING_RATE,
                "weight_decay": toy.WEIGHT_DECAY,
                "max_grad_norm": toy.MAX_GRAD_NORM,
                "optim": "adamw_torch",
                "logging_steps": toy.LOGGING_STEPS,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": False,
                "use_cpu": cpu or not torch.accelerator.is_available(),  # bf16 on a CPU must be asked for
            }
            arguments = library.TrainingArguments(**{**values, **more})
            trainer = library.Trainer(
                model=toy.ToyModel(),
                args=arguments,
                train_dataset=toy.ToyData(2 * num_steps * accumulation * toy.BATCH_SIZE),
                eval_dataset=toy.ToyData(toy.EVAL_BATCHES * toy.BATCH_SIZE) if "eval_strategy" in more else None,
                data_collator=collator,
            )
            trainer.train()

    return run


def with_lightning(collator: Any, num_steps: int, cpu: bool) -> None:
    """A LightningModule that logs its loss, with the default progress bar."""
    lightning: Any = importlib.import_module("lightning")
    loggers: Any = importlib.import_module("lightning.pytorch.loggers")

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = toy.ToyModel()

        def training_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer, schedule = toy.optimizer_and_schedule(self.model, num_steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with tempfile.TemporaryDirectory() as directory:
        trainer = lightning.Trainer(
            max_steps=num_steps,
            accelerator="cpu" if cpu else "auto",
            devices=1,
            gradient_clip_val=toy.MAX_GRAD_NORM,
            log_every_n_steps=toy.LOGGING_STEPS,
            logger=loggers.CSVLogger(directory),
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), _loader(collator, num_steps))


def _loader(collator: Any, num_steps: int) -> DataLoader[Any]:
    data = toy.ToyData(2 * num_steps * toy.BATCH_SIZE)
    return DataLoader(data, batch_size=toy.BATCH_SIZE, shuffle=True, collate_fn=collator)


CONTENDERS = [
    Contender("bare loop", "torch", bare()),
    Contender("accelerate loop", "accelerate", with_accelerate),
    Contender("lightning", "lightning", with_lightning),
    Contender("transformers", "transformers", with_trainer("transformers")),
    Contender("trainwright", "trainwright", with_trainer("trainwright")),
    Contender("bare loop, accumulation 4", "torch", bare(4), micro_batches=4),
    Contender("transformers, accumulation 4", "transformers", with_trainer("transformers", 4), micro_batches=4),
    Contender("trainwright, accumulation 4", "trainwright", with_trainer("trainwright", 4), micro_batches=4),
    Contender("bare loop, bf16", "torch", bare(bf16=True), variant="bf16"),
    Contender("transformers, bf16", "transformers", with_trainer("transformers", bf16=True), variant="bf16"),
    Contender("trainwright, bf16", "trainwright", with_trainer("trainwright", bf16=True), variant="bf16"),
    Contender("bare loop, no clipping", "torch", bare(max_grad_norm=0.0), variant="no clipping"),
    Contender(
        "transformers, no clipping",
        "transformers",
        with_trainer("transformers", max_grad_norm=0.0),
        variant="no clipping",
    ),
    Contender(
        "trainwright, no clipping", "trainwright", with_trainer("trainwright", max_grad_norm=0.0), variant="no clipping"
    ),
]
