"""Trainings as users write them, with one tracker: a real `Trainer` and a tiny Llama built from its configuration.

Each function runs in a process of its own (`battery.program`), and returns what went through `Trainer.log`, so that
what a tracker stored can be compared with it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from battery import Reader, StoredRun, program, stored
from of_runs import benchmark_module
from trainwright import Trainer, TrainerCallback, TrainingArguments
from trainwright.tracking.base import tracker_class

SECRET = "hf_averysecrettoken"
HIDDEN_SIZE = 12
History = list[dict[str, Any]]


def tiny_llama(trial: Any = None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    )


def tokens(length: int = 32) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, 16, (length, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(
    reader: Reader, name: str | None = "first", callbacks: tuple[Any, ...] = (), cls: type = Trainer, **arguments: Any
) -> Trainer:
    """Six steps, a log line for each, an evaluation and a checkpoint at every second."""
    given: dict[str, Any] = {
        "output_dir": f"out-{name}",
        "run_name": name,
        "report_to": "none" if reader.constructor else reader.name,
        "hub_token": SECRET,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    if reader.constructor:
        callbacks = (tracker_class(reader.name)(**reader.constructor), *callbacks)
    return cls(
        None if "model_init" in arguments else tiny_llama(),
        TrainingArguments(**{key: value for key, value in given.items() if key != "model_init"}),
        train_dataset=tokens(),
        eval_dataset=tokens(8),
        model_init=arguments.get("model_init"),
        callbacks=list(callbacks),
    )


class At(TrainerCallback):
    """Do something at the log line of a step, after the trackers have it."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def fail(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


def train(reader: Reader) -> list[History]:
    """Two Trainers in one process; with each, an evaluation and a prediction after the training."""
    histories = []
    for name in ("first", "second"):
        made = trainer(reader, name, learning_rate=0.01 if name == "first" else 0.02)
        made.train()
        made.evaluate(metric_key_prefix="eval_later")
        tested = made.predict(tokens(8)).metrics
        histories.append([*made.state.log_history, {**tested, "step": made.state.global_step}])
    return histories


def ended(reader: Reader) -> None:
    """Three trainings: one that fails, one that is interrupted, one that is asked to end; the program goes on."""
    for name, action, kind in (
        ("failed", fail(RuntimeError("out of luck")), RuntimeError),
        ("interrupted", fail(KeyboardInterrupt()), KeyboardInterrupt),
        ("terminated", lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit),
    ):
        try:
            trainer(reader, name, (At(3, action),)).train()
        except kind:
            continue
        raise AssertionError(f"{name} was not")


def crashed(reader: Reader) -> None:
    """The process is gone between two checkpoints, in the middle of a training."""

    def crash() -> None:
        import time

        time.sleep(reader.sends_within_s)
        os._exit(9)

    trainer(reader, "resumed", (At(3, crash),)).train()


def resumed(reader: Reader) -> History:
    """The same program again, from the last checkpoint."""
    made = trainer(reader, "resumed")
    made.train(resume_from_checkpoint=True)
    return made.state.log_history


def failed_and_resumed(reader: Reader, folder: Path) -> tuple[StoredRun, list[tuple[int, float]]]:
    """Two programs in `folder`, the second resumes: the one run that is stored, and the (step, loss) it should have."""
    fails = At(3, fail(RuntimeError("out of luck")))
    program(reader, folder, lambda: trainer(reader, "resumed", (fails,)).train(), code=1)
    history = program(reader, folder, lambda: resumed(reader))
    (run,) = stored(reader, folder)
    return run, [(line["step"], line["loss"]) for line in history if "loss" in line]


def search(reader: Reader) -> list[float]:
    """Two trials with a `run_name` and without `hp_name`; returns their learning rates."""
    made = trainer(reader, "sweep", model_init=tiny_llama, max_steps=2)
    rates: list[float] = []

    def space(trial: Any) -> dict[str, float]:
        rates.append(trial.suggest_float("learning_rate", 0.001, 0.1))
        return {"learning_rate": rates[-1]}

    made.hyperparameter_search(space, n_trials=2, backend="optuna")
    return rates


def cost(reader: Reader) -> list[tuple[int, int]]:
    """(Python calls, C calls) of 40 steps between two log lines, first without the tracker, then with it."""
    toy, probes = benchmark_module("toy"), benchmark_module("probes")
    counts = []
    for is_on in (False, True):
        counter = probes.CallCounter()
        made = Trainer(
            toy.ToyModel(),
            TrainingArguments(
                f"out-cost-{is_on}",
                report_to=reader.name if is_on and not reader.constructor else "none",
                max_steps=65,
                per_device_train_batch_size=4,
                logging_steps=1000,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            data_collator=toy.MeasuringCollator(20, 60, counter.start, counter.stop),
            train_dataset=toy.ToyData(400),
            callbacks=[tracker_class(reader.name)(**reader.constructor)] if is_on and reader.constructor else None,
        )
        made.train()
        counts.append((counter.num_python, counter.num_c))
    return counts


# Names and values that packages treat differently; `docs/trackers.md` says what each keeps. What is there for its name
# has a number of its own, by which it is found where the package changes the name.
ODD_SCALARS: dict[str, Any] = {
    "plain": 0.5,
    "zero": 0,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus_inf": float("-inf"),
    "true": True,
    "text": "some words",
    "none": None,
    "huge_int": 2**70,
    "with/slash": 11.5,
    "double//slash": 12.5,
    "../up": 13.5,
    "with space": 14.5,
    "with:colon": 15.5,
    "ümlaut": 16.5,
    "k" * 250: 17.5,
    "several": torch.tensor([1.0, 2.0]),
    "nested": {"a": 18.5},
}
ODD_PARAMETERS: dict[str, Any] = {
    "plain": 0.5,
    "_underscore": 1001,
    "nan": float("nan"),
    "inf": float("inf"),
    "true": True,
    "none": None,
    "text": "some words",
    "long_text": "x" * 7000,
    "nested": {"a": {"b": 1002}, "c": [1, 2]},
    "empty": {},
    "double//slash": 1003,
    "../up": 1004,
    "k" * 300: 1005,
    **{f"many_{number}": 2000 + number for number in range(120)},
}


def odd_values(reader: Reader) -> History:
    """Log lines and a configuration full of odd names and values. The training ends well."""

    class Odd(TrainerCallback):
        made: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.made.log(dict(ODD_SCALARS))

    odd = Odd()
    made = odd.made = trainer(reader, "odd", (odd,), max_steps=2, save_strategy="no", eval_strategy="no")
    for name, value in ODD_PARAMETERS.items():
        setattr(made.model.config, name, value)
    made.train()
    return made.state.log_history


def folder_bytes(folder: Path) -> bytes:
    """All that was written below `folder`, but for the outputs of the Trainer."""
    return b"".join(
        path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and not path.relative_to(folder).parts[0].startswith("out-")
    )
