"""The runs whose results `compare_commits.py` compares: public names only, so that they run on any commit.

Owns: which configurations there are, and what is written down of each. Leaves to others: the configurations of tests
(`tests/shared/configurations.py`), commits and comparing (`compare_commits.py`, which starts this in a process of its
own with another commit's package on its path).

Each configuration is run as a whole, then stopped and resumed. Its folder holds the output directories of both, as the
runs left them, and `result.pt`: the end of every train(), the weights after every step, the events that a callback saw,
the hooks that were called, evaluations, predictions, and errors. The current directory is the folder of all results, so
that every path in a file is the same for both commits.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

import configurations as shared
import trainwright
from line import LineData, LineModel
from trainwright import EarlyStoppingCallback, ExportableState, Trainer, TrainerCallback

PATIENCE_S = 120  # after which a configuration counts as hanging
NUM_DRAWS = 30
NUM_DRAWS_WITH_WORKERS = 3
RESULT, OUTPUT = "result.pt", "output.txt"

Case = Callable[[str, dict[str, Any]], None]  # (folder, what it writes down)


# ------------------------------------------------------------------------------------------------ what is written down


class Recorder(TrainerCallback, ExportableState):
    """Writes down every event with the state it came in, and the weights after every step; saved with checkpoints."""

    def __init__(self, num_events: int = 0) -> None:
        self.num_events = num_events
        self.events: list[Any] = []
        self.weights: list[Any] = []

    def state(self) -> dict[str, Any]:
        return {"args": {"num_events": self.num_events}, "attributes": {}}


def _recording(event: str) -> Any:
    def record(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_events += 1
        told = {name: kwargs[name] for name in ("logs", "metrics") if kwargs.get(name) is not None}
        flags = [name for name, value in sorted(vars(control).items()) if value is True]
        self.events.append((event, state.global_step, state.epoch, flags, plain(told)))
        if event == "on_step_end":
            self.weights.append(copied(kwargs["model"].state_dict()))

    return record


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Recorder, _event, _recording(_event))

HOOKS = (
    "get_train_dataloader", "create_optimizer_and_scheduler", "create_optimizer", "create_scheduler",
    "get_batch_samples", "training_step", "_prepare_inputs", "compute_loss", "_maybe_log_save_evaluate",
    "training_logs", "log", "evaluate", "predict", "evaluation_loop", "prediction_step", "get_eval_dataloader",
    "get_test_dataloader", "_save_checkpoint", "save_model", "_save", "_save_optimizer_and_scheduler", "_save_scaler",
    "_save_rng_state", "_rotate_checkpoints", "_load_from_checkpoint", "_load_best_model",
    "_load_optimizer_and_scheduler", "_load_rng_state", "store_flos",
)  # fmt: skip


def overriding(*names: str) -> type[Trainer]:
    """A Trainer whose hooks `names` write down that they were called, with the names of their keyword arguments."""

    def wrapped(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.called.append((name, len(args), sorted(kwargs)))
            return getattr(super(Overriding, self), name)(*args, **kwargs)

        return hook

    class Overriding(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.called: list[Any] = []
            super().__init__(*args, **kwargs)

    for name in names:
        setattr(Overriding, name, wrapped(name))
    return Overriding


def copied(value: Any) -> Any:
    """`value` with every tensor copied, since training goes on."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(copied, value)) if type(value) in (list, tuple) else list(map(copied, value))
    return value


def plain(value: Any) -> Any:
    """`value` as what `torch.load(weights_only=True)` reads: tensors, numbers, text, lists, dictionaries."""
    if type(value) is str:
        return value.replace(os.getcwd(), ".")
    if isinstance(value, torch.Tensor) or value is None or type(value) in (bool, int, float):
        return copied(value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype != object else plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, dict):
        return {key if type(key) in (int, str) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return f"a {type(value).__name__}"


def end_of(trainer: Trainer) -> dict[str, Any]:
    """Where a run ended: everything of it that a user can see."""
    state, found = trainer.state, {}
    if trainer.optimizer is not None:
        found = {"optimizer": trainer.optimizer.state_dict(), "scheduler": trainer.lr_scheduler.state_dict()}
    if trainer.args.ema_decay is not None and trainer.optimizer is not None:
        with trainer.averaged_weights():
            found["average"] = copied(trainer.model.state_dict())
    generators = [torch.get_rng_state(), str(random.getstate()), np.random.get_state()[1].tolist()]
    return {
        **found,
        "weights": trainer.model.state_dict(),
        "state": {field.name: getattr(state, field.name) for field in dataclasses.fields(state)},
        "generators": generators,
        "called": getattr(trainer, "called", []),
    }


def train(trainer: Trainer, recorder: Recorder, result: dict[str, Any], name: str, **arguments: Any) -> None:
    """One train(), and what it gave, under `name` in `result`."""
    found = result[name] = {}
    try:
        output = trainer.train(**arguments)
        found["output"] = {"step": output.global_step, "loss": output.training_loss, "metrics": output.metrics}
    except (Exception, SystemExit) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found.update(end_of(trainer), events=recorder.events, weights_of_steps=recorder.weights)
    result[name] = plain(found)


def from_last(out: str) -> dict[str, Any]:
    """Arguments of a train() that goes on where there is a checkpoint in `out`, and begins where there is none."""
    return {"resume_from_checkpoint": True} if list(Path(out).glob("checkpoint-*")) else {}


def judge(trainer: Trainer, result: dict[str, Any], name: str, rows: Any) -> None:
    """evaluate() and predict() of a trained model."""
    found = result[name] = {}
    try:
        found["metrics"] = trainer.evaluate()
        predicted = trainer.predict(rows)
        found |= {"predictions": predicted.predictions, "labels": predicted.label_ids, "of predict": predicted.metrics}
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    result[name] = plain(found)


# ------------------------------------------------------------------------------------------------------ configurations


def of_features(features: tuple[str, ...], way: str, **options: Any) -> Case:
    """Features that meet: the whole run, and one that is stopped after step 3 in a `way` and resumed."""

    def case(folder: str, result: dict[str, Any]) -> None:
        values = {"async_save": False, **options}

        def made(out: str, *callbacks: TrainerCallback) -> tuple[Trainer, Recorder]:
            recorder = Recorder()
            return shared.run_with(f"{folder}/{out}", features, callbacks=[recorder, *callbacks], **values), recorder

        trainer, recorder = made("whole")
        train(trainer, recorder, result, "whole")
        judge(trainer, result, "whole, judged", LineData(9, seed=7))
        train(*made("stopped", shared.Stop(3, way)), result, "stopped")
        trainer, recorder = made("stopped")
        train(trainer, recorder, result, "resumed", resume_from_checkpoint=True)
        judge(trainer, result, "resumed, judged", LineData(9, seed=7))

    return case


def drawn(seed: int) -> Case:
    """A whole configuration, as `tests/faults/test_any_configuration.py` draws it."""

    def case(folder: str, result: dict[str, Any]) -> None:
        configuration = shared.draw(seed)
        options, at = dict(configuration["options"]), 0

        def made(out: str, *callbacks: TrainerCallback) -> tuple[Trainer, Recorder]:
            recorder = Recorder()
            return shared.trainer_of(configuration, f"{folder}/{out}", [recorder, *callbacks], options), recorder

        if configuration["changed"]:
            at = 2
            train(*made("whole", shared.Stop(at, "asked")), result, "whole, first part")
            options |= configuration["changed"]
            shutil.copytree(f"{folder}/whole", f"{folder}/stopped")
        trainer, recorder = made("whole")
        train(trainer, recorder, result, "whole", **from_last(f"{folder}/whole"))
        ends = [event[1] for event in recorder.events if event[0] == "on_epoch_end"]
        steps = trainer.state.global_step
        stops = sorted({shared.step_of(place, at, steps, ends) for place in configuration["places"]})
        for number, (stop, way) in enumerate(zip(stops, configuration["ways"], strict=False)):
            resume = from_last(f"{folder}/stopped")
            train(*made("stopped", shared.Stop(stop, way)), result, f"stopped {number}", **resume)
        train(*made("stopped"), result, "resumed", **from_last(f"{folder}/stopped"))

    return case


def of_line(made: Callable[..., Trainer] = shared.make_run, **options: Any) -> Case:
    """The line model with these arguments, whole and resumed from its middle, evaluated, predicted and saved."""

    def case(folder: str, result: dict[str, Any]) -> None:
        values = {"max_steps": 6, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3} | options
        given = values.pop("trainer", {})

        def trainer_in(out: str) -> tuple[Trainer, Recorder]:
            recorder, more = Recorder(), [one() for one in given.get("callbacks", ())]
            return made(f"{folder}/{out}", {**given, "callbacks": [recorder, *more]}, **values), recorder

        trainer, recorder = trainer_in("whole")
        train(trainer, recorder, result, "whole")
        judge(trainer, result, "whole, judged", LineData(9, seed=7))
        trainer.save_model(f"{folder}/saved")
        trainer.save_state()
        middle = f"{folder}/whole/checkpoint-4"
        if Path(middle).is_dir():
            train(*trainer_in("resumed"), result, "resumed", resume_from_checkpoint=middle)
        recorder.events, recorder.weights = [], []
        train(trainer, recorder, result, "second train()")

    return case


def a_search(folder: str, result: dict[str, Any]) -> None:
    """Two trials of a search."""
    given = {"model": None, "model_init": lambda: LineModel(dropout=0.5)}
    trainer = shared.run_with(
        f"{folder}/out", ("ema_decay",), trainer=given, async_save=False, eval_strategy="steps", eval_steps=2
    )
    rates = iter([0.1, 0.01])
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", *[next(rates)] * 2)},
        n_trials=2,
        backend="optuna",
    )
    result["best"] = plain([best.run_id, best.objective, best.hyperparameters])
    result["end"] = plain(end_of(trainer))


class Meter:
    """A metric that is counted batch by batch."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def __call__(self, found: Any, compute_result: bool = False) -> dict[str, float]:
        self.sum += float((found.predictions - found.label_ids).abs().sum())
        self.count += len(found.label_ids)
        if not compute_result:
            return {}
        value, self.sum, self.count = self.sum / self.count, 0.0, 0
        return {"error": value}


def error_of(found: Any) -> dict[str, float]:
    parts = {name: getattr(found, name) for name in ("inputs", "losses") if getattr(found, name, None) is not None}
    arrays = {name: part["x"] if isinstance(part, dict) else part for name, part in parts.items()}
    sums = {name: float(np.asarray(array).sum()) for name, array in arrays.items()}
    return {"error": float(np.abs(np.asarray(found.predictions) - np.asarray(found.label_ids)).mean()), **sums}


def squared_error(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    num_items = len(labels) if num_items_in_batch is None else num_items_in_batch
    return ((outputs["logits"] - labels) ** 2).sum() / num_items


LINE: dict[str, dict[str, Any]] = {
    "nothing set": {},
    "metrics": {"trainer": {"compute_metrics": error_of}},
    "metrics of inputs and losses": {
        "include_for_metrics": ["inputs", "loss"], "model": shared.Line, "trainer": {"compute_metrics": error_of},
    },
    "metrics batch by batch": {"batch_eval_metrics": True, "trainer": {"compute_metrics": Meter()}},
    "logits before metrics": {
        "trainer": {"compute_metrics": error_of, "preprocess_logits_for_metrics": lambda logits, labels: logits * 2}
    },
    "loss only": {"prediction_loss_only": True},
    "evaluation in parts": {"eval_accumulation_steps": 1, "per_device_eval_batch_size": 2},
    "evaluation in bf16": {"bf16_full_eval": True},
    "evaluation not concatenated": {"eval_do_concat_batches": False, "per_device_eval_batch_size": 2},
    "several evaluation sets": {"trainer": {"eval_dataset": {"a": LineData(9, seed=5), "b": LineData(5, seed=6)}}},
    "evaluation at the start": {"eval_on_start": True, "eval_delay": 1},
    "evaluation and saves by epoch": {
        "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch", "max_steps": -1,
        "num_train_epochs": 2,
    },
    "best": {
        "save_strategy": "best", "metric_for_best_model": "error", "trainer": {"compute_metrics": error_of},
        "load_best_model_at_end": True, "eval_steps": 1,
    },
    "best and at most one": {"load_best_model_at_end": True, "eval_steps": 2, "save_total_limit": 1},
    "early stopping": {
        "load_best_model_at_end": True, "eval_steps": 2, "max_steps": 20, "learning_rate": 2.0,
        "trainer": {"callbacks": [lambda: EarlyStoppingCallback(1)]},
    },
    "model only": {"save_only_model": True},
    "pickles": {"save_safetensors": False},
    "frozen weights": {"model": shared.FrozenLine},
    "accumulation over an uneven epoch": {
        "gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 3, "eval_strategy": "epoch",
    },
    "bf16": {"bf16": True},
    "callback states": {"restore_callback_states_from_checkpoint": True},
    "step skipped": {"nonfinite": "skip", "trainer": {"train_dataset": shared.OneNaN()}},
    "NaN raised": {"nonfinite": "raise", "trainer": {"train_dataset": shared.OneNaN()}},
    "model_init": {"trainer": {"model": None, "model_init": lambda: LineModel(dropout=0.5)}},
    "loss of the user": {"trainer": {"compute_loss_func": squared_error}},
    "another seed for data": {"data_seed": 9, "seed": 3, "train_sampling_strategy": "sequential"},
    "tokens counted": {"include_num_input_tokens_seen": "all", "model": shared.Line},
    "adafactor, cosine": {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "asynchronous, at most two": {
        "async_save": True, "save_total_limit": 2, "load_best_model_at_end": True, "eval_steps": 2,
    },
}  # fmt: skip
WITH_HOOKS = {
    "every hook overridden": HOOKS,
    "hooks of a step overridden": ("get_batch_samples", "training_step", "compute_loss", "_prepare_inputs"),
    "hooks of a save overridden": ("_save_checkpoint", "save_model", "_save", "_save_optimizer_and_scheduler"),
    "hooks of an evaluation overridden": ("evaluate", "evaluation_loop", "prediction_step", "log"),
}


def cases() -> dict[str, Case]:
    """Name -> configuration; those whose packages are missing are left out."""
    ways = ("asked", "signal", "exception")
    found: dict[str, Case] = {}
    rows = [(one,) for one in shared.FEATURES] + shared.PAIRS
    for number, features in enumerate(rows):
        needed = [shared.NEEDED[one] for one in features if one in shared.NEEDED]
        if all(importlib.util.find_spec(package) for package in needed):
            found["+".join(features)] = of_features(features, ways[number % 3])
    for feature in ("ema_decay", "load_best_model_at_end"):  # some, since each starts a process that imports torch
        found[f"{feature}, asynchronous"] = of_features((feature,), "signal", async_save=True)
    found |= {name: of_line(**options) for name, options in LINE.items()}
    for name, hooks in WITH_HOOKS.items():
        found[name] = of_line(_with_hooks(hooks))
    if importlib.util.find_spec("optuna"):
        found["a search"] = a_search
    plain_draws, with_workers, seed = 0, 0, 0
    while plain_draws < NUM_DRAWS or with_workers < NUM_DRAWS_WITH_WORKERS:
        options = shared.draw(seed)["options"]
        workers = options["dataloader_num_workers"]
        if not options["async_save"] and not (workers and "eval_strategy" in options):
            if workers and with_workers < NUM_DRAWS_WITH_WORKERS:
                with_workers += 1
                found[f"draw {seed}"] = drawn(seed)
            elif not workers and plain_draws < NUM_DRAWS:
                plain_draws += 1
                found[f"draw {seed}"] = drawn(seed)
        seed += 1
    return found


def _with_hooks(names: tuple[str, ...]) -> Callable[..., Trainer]:
    return lambda out, given, **options: shared.make_run(out, given, cls=overriding(*names), **options)


# ---------------------------------------------------------------------------------------------------- running them all


def folder_of(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def run(name: str, case: Case) -> None:
    """Run one configuration in its folder, from the same random state whatever ran before."""
    folder, result = folder_of(name), {}
    os.makedirs(folder)
    trainwright.set_seed(0)
    previous = signal.signal(signal.SIGALRM, _is_late)
    signal.alarm(PATIENCE_S)
    try:
        case(folder, result)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    torch.save(plain(result), os.path.join(folder, RESULT))


def _is_late(*_: Any) -> None:
    raise TimeoutError(f"the configuration did not end in {PATIENCE_S} s")


def main() -> None:
    """`compared_runs.main()` in a folder for results, with a package's `src` first on the path.

    Arguments: the directory that `trainwright` must come from, and the names to run as JSON. Says each name when it
    begins.
    """
    source, names = Path(sys.argv[1]), json.loads(sys.argv[2])
    found = Path(trainwright.__file__)
    if source.resolve() not in found.resolve().parents:
        sys.exit(f"trainwright comes from {found}, not from {source}")
    torch.set_num_threads(1)
    progress = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    with open(OUTPUT, "w") as output:
        os.dup2(output.fileno(), 1)  # also what libraries print without Python's help
        os.dup2(output.fileno(), 2)
    for name, case in cases().items():
        if name in names:
            progress.write(name + "\n")
            run(name, case)
