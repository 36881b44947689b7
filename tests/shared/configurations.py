"""Configurations of runs, made of public names only: what tests hold to the bit, and `benchmarks/compare_commits.py`
compares between two commits, an older one of which may know no other names.

Owns: a tiny run (`make_run`), features that meet (`FEATURES`, `run_with`), whole configurations that are drawn (`draw`,
`trainer_of`), ways of stopping. Leaves to others: what must hold of such runs.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from line import LineData, LineModel
from trainwright import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

STEPS = 6  # of a run of features that meet
NUM_FITTING = 2  # rows that the device of `SmallDevice` has room for
NAN_SAMPLE = 7


def make_run(
    out: str | os.PathLike[str], trainer: dict[str, Any] | None = None, cls: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    """A Trainer of the line model with dropout (so that every random number counts), saving in `out`.

    `model`: makes another one.
    """
    model = options.pop("model", None)
    values: dict[str, Any] = {
        "output_dir": str(out),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "logging_dir": "logs",  # the default holds the time of day, and training_args.bin would differ each second
    }
    given: dict[str, Any] = {
        "model": model() if model else LineModel(dropout=0.5),
        "train_dataset": LineData(),
        "eval_dataset": LineData(9, seed=5),
    }
    run = cls(args=TrainingArguments(**(values | options)), **(given | (trainer or {})))
    run.remove_callback(PrinterCallback)
    return run


class FrozenLine(LineModel):
    """The line model behind weights that are frozen, and more than what is trained."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.before = torch.nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return super().forward(self.before(x), labels)


# ----------------------------------------------------------------------------------------------- features that meet


class SmallDevice(LineModel):
    """Runs out of memory with more than NUM_FITTING rows in training."""

    def forward(self, x, labels=None):
        if self.training and len(x) > NUM_FITTING:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x, labels)


class Classifying(LineModel):
    """The line in 16 classes: a linear head over a layer, whose loss needs no logits."""

    def __init__(self, num_fitting=None):
        super().__init__(width=3, dropout=0.5)
        self.linear, self.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 16)
        self.num_fitting = num_fitting  # rows, in training

    def get_output_embeddings(self):
        return self.head

    def forward(self, x, labels=None):
        if self.training and self.num_fitting and len(x) > self.num_fitting:
            raise torch.OutOfMemoryError("out of memory")
        logits = self.head(self.linear(self.dropout(x)))  # (batch, classes)
        if labels is None:
            return {"logits": logits}
        classes = (2 * labels.nan_to_num()[:, 0] + 8).long().clamp(0, 15)
        return {"loss": torch.nn.functional.cross_entropy(logits, classes) + 0 * labels.sum(), "logits": logits}


class OneNaN(LineData):
    """One sample makes the loss NaN."""

    def __init__(self):
        super().__init__()
        self.y[NAN_SAMPLE] = float("nan")


def adapted(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["linear"], r=2))


FEATURES = {
    "ema_decay": {"ema_decay": 0.75, "ema_start_step": 1},
    "optimizer_in_backward": {"optimizer_in_backward": True, "max_grad_norm": 0},
    "schedule_free": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
    "load_best_model_at_end": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
    "nonfinite": {"nonfinite": "rollback"},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "watched": {"time_breakdown": "logs", "log_speed": True, "profile_steps": "2-3"},
    "learning_rate_per_module": {"learning_rate_per_module": {".*linear.*": 0.03}},
    "peft": {},
    "linear_cross_entropy": {"linear_cross_entropy": True},
}
REFUSED = {  # pairs that cannot work, and what the error must name
    ("ema_decay", "schedule_free"): "ema_decay",
    ("optimizer_in_backward", "schedule_free"): "optimizer_in_backward=True cannot work",
    ("optimizer_in_backward", "auto_find_batch_size"): "changes weights during the backward pass",
}
NEEDED = {"schedule_free": "schedulefree", "peft": "peft"}  # packages
PAIRS = list(itertools.combinations(FEATURES, 2))


def run_with(out, features, **options):
    """A Trainer with these features; not yet trained."""
    is_small = "auto_find_batch_size" in features
    if "linear_cross_entropy" in features:
        model = Classifying(NUM_FITTING if is_small else None)
    else:
        model = SmallDevice(dropout=0.5) if is_small else LineModel(dropout=0.5)
    given = {"model": adapted(model) if "peft" in features else model}
    if "nonfinite" in features:
        given["train_dataset"] = OneNaN()
    values = {"max_steps": STEPS, "save_steps": 2, "async_save": True}
    for feature in features:
        values |= FEATURES[feature]
    callbacks = options.pop("callbacks", [])
    given |= {"callbacks": callbacks, **options.pop("trainer", {})}
    return make_run(out, given, **(values | options))


# ------------------------------------------------------------------------------- data whose samples draw random numbers


class Noisy(Dataset):
    """Each sample draws from all three generators, as random crops and token masks do."""

    def __init__(self, length=26):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        noise = [random.random(), float(np.random.rand()), torch.rand(()).item()]
        return {
            "x": torch.tensor([index / self.length, *noise[:2]]),
            "labels": torch.tensor([noise[2]]),
            "input_ids": [0] * (1 + index % 5),  # what grouping by length looks at
        }


class Shuffled(IterableDataset):
    """A stream with a shuffle buffer that draws from Python's generator."""

    def __init__(self, length=26, buffer_size=6):
        self.length, self.buffer_size = length, buffer_size

    def __iter__(self):
        buffer = []
        for index in range(self.length):
            buffer.append(index)
            if len(buffer) == self.buffer_size:
                yield self.sample(buffer.pop(random.randrange(self.buffer_size)))
        while buffer:
            yield self.sample(buffer.pop(random.randrange(len(buffer))))

    def sample(self, index):
        return {"x": torch.full((3,), index / self.length), "labels": torch.rand(1)}


class Sharing(Shuffled):
    """A stream with a shuffle buffer that workers share by turns."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        buffer = []
        for index in range(first, self.length, every):
            buffer.append(index)
            if len(buffer) == self.buffer_size:
                yield self.sample(buffer.pop(random.randrange(self.buffer_size)))
        while buffer:
            yield self.sample(buffer.pop(random.randrange(len(buffer))))


class SizedSharing(Sharing):
    """Says its length, so that its epochs are known."""

    def __len__(self):
        return self.length


class NoisyCollator:
    """Stacks samples and adds noise from torch's global generator."""

    def __call__(self, samples):
        x = torch.stack([sample["x"] for sample in samples])
        return {"x": x + 0.1 * torch.rand_like(x), "labels": torch.stack([sample["labels"] for sample in samples])}


class OwnGeneratorCollator(NoisyCollator):
    """Draws from a generator of its own, as a masking collator with a seed does."""

    generator = None

    def __call__(self, samples):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(5)
        batch = super().__call__(samples)
        return {**batch, "x": batch["x"] + torch.rand(batch["x"].shape, generator=self.generator)}


class HeldGeneratorsCollator(NoisyCollator):
    """Holds generators of Python and NumPy, one of them in a dict, from its construction on."""

    def __init__(self):
        self.python = random.Random(1)
        self.more = {"new": np.random.default_rng(2), "legacy": np.random.RandomState(3)}

    def __call__(self, samples):
        batch = super().__call__(samples)
        noise = self.python.random() + self.more["new"].random() + self.more["legacy"].rand()
        return {**batch, "x": batch["x"] + noise}


class Notes(NoisyCollator):
    """Stacks samples and nothing else."""

    def __call__(self, samples):
        return {name: torch.stack([sample[name] for sample in samples]) for name in ("x", "labels")}


class NoisySentences(Noisy):
    """Tokenised samples of fixed lengths whose tokens are drawn anew each time; two fill a pack of 16."""

    def __getitem__(self, index):
        drawn = [random.randrange(16), int(np.random.randint(16)), int(torch.randint(16, ()))]
        return {"input_ids": [index % 16, *drawn, *range(5 if index % 2 else 3)]}


class SentenceModel(torch.nn.Module):
    """Predicts the next token from the mean of those of its sample so far, under dropout."""

    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16)

    def forward(self, input_ids, labels, seq_idx):
        seen = (seq_idx[:, :, None] == seq_idx[:, None, :]).tril().float()  # (packs, length, length)
        hidden = seen @ self.embed(input_ids) / seen.sum(-1, keepdim=True)
        logits = self.head(torch.nn.functional.dropout(hidden, 0.2, self.training))
        return {"loss": torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


# ------------------------------------------------------------------------------------------ whole configurations, drawn


COLLATORS = {"noisy": NoisyCollator, "late generator": OwnGeneratorCollator, "held": HeldGeneratorsCollator}


class Line(LineModel):
    main_input_name = "x"  # what is counted as tokens


class Sentences(SentenceModel):
    """Takes unpacked samples too, as an evaluation collates them."""

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels, seq_idx=None, attention_mask=None):
        return super().forward(input_ids, labels, torch.zeros_like(input_ids) if seq_idx is None else seq_idx)


class SilentEvaluation(Trainer):
    """Evaluates without the noise of the collator: an evaluation that a signal ends draws its numbers twice."""

    def get_eval_dataloader(self, eval_dataset=None):
        noisy, self.data_collator = self.data_collator, Notes()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = noisy


def draw(seed):
    """A configuration: plain values, so that a failure can print it."""
    r = random.Random(seed)
    data = r.choice(["map", "map", "map", "stream", "sized stream", "packed"])
    workers = r.choice([0, 0, 0, 1, 2])
    options = {
        "per_device_train_batch_size": r.randint(1, 5),
        "gradient_accumulation_steps": r.choice([1, 1, 2, 3, 5]),
        "dataloader_drop_last": r.random() < 0.4,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0 and r.random() < 0.7,
        "per_device_eval_batch_size": 3,
        "optim": r.choice(["adamw_torch", "sgd", "adafactor"]),
        "lr_scheduler_type": r.choice(["linear", "cosine", "constant_with_warmup"]),
        "warmup_steps": r.choice([0, 2]),
        "max_grad_norm": r.choice([0.0, 1.0]),
        "bf16": r.random() < 0.25,
        "ema_decay": r.choice([None, None, 0.75]),
        "logging_steps": r.choice([1, 2, 3, 1000]),
        "logging_first_step": r.random() < 0.3,
        "include_num_input_tokens_seen": r.choice(["no", "no", "all"]),
        "save_steps": r.choice([1, 2, 3]),
        "save_total_limit": r.choice([None, 1, 2]),
        "async_save": r.random() < 0.3,
    }
    if data != "stream" and r.random() < 0.5:
        options["num_train_epochs"] = r.choice([1, 2, 3, 1.5, 2.3])
    else:
        options["max_steps"] = r.randint(2, 14)
    if data == "map":
        options["train_sampling_strategy"] = r.choice(["random", "sequential", "group_by_length", "batch_rebalance"])
    elif data == "packed":
        options |= {"packing": True, "packing_length": 16}
    evaluation = r.choice(["no", "no", "steps", "epoch", "best"])
    if evaluation == "steps":
        options |= {"eval_strategy": "steps", "eval_steps": r.choice([1, 2, 3])}
    elif evaluation == "epoch":
        options |= {"eval_strategy": "epoch", "logging_strategy": r.choice(["steps", "epoch"])}
    elif evaluation == "best":
        every = options["save_steps"]
        options |= {"eval_strategy": "steps", "eval_steps": every, "load_best_model_at_end": True}
    changed = {}
    if r.random() < 0.25:
        changed = {"per_device_train_batch_size": r.randint(1, 5), "gradient_accumulation_steps": r.choice([1, 2, 3])}
    length, collator = r.randint(15, 40), None if data == "packed" else r.choice(list(COLLATORS))
    if collator == "late generator" and "stream" in data and options["dataloader_persistent_workers"]:
        collator = "held"  # a limit of docs/reliability.md: one made late goes on from pass to pass
    if data == "packed":
        options["linear_cross_entropy"] = r.random() < 0.5
    return {
        "data": data,
        "length": length,
        "collator": collator,
        "options": options,
        "changed": changed,  # after a first stop that both runs have in common
        "places": [r.random() for _ in range(r.choice([1, 1, 2]))],  # what they mean: `step_of`
        "ways": [r.choice(["asked", "signal", "exception"]) for _ in range(2)],
        "fork": r.random() < 0.3,
    }


def trainer_of(configuration, out, callbacks, options):
    data, length = configuration["data"], configuration["length"]
    kinds = {"map": Noisy, "stream": Sharing, "sized stream": SizedSharing, "packed": NoisySentences}
    collator = configuration["collator"]
    # Evaluation data that draw random numbers are not in the promise: a stream would see others when it is read again.
    held_out = [{"input_ids": list(range(row, row + 6))} for row in range(7)] if data == "packed" else LineData(7)
    trainer = (Trainer if data == "packed" else SilentEvaluation)(
        Sentences() if data == "packed" else Line(dropout=0.2),
        TrainingArguments(
            str(out), report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.05, save_strategy="steps",
            logging_dir="logs", **options,
        ),
        train_dataset=kinds[data](2 * length if data == "packed" else length),
        eval_dataset=held_out if "eval_strategy" in options else None,
        data_collator=collator and COLLATORS[collator](),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


# ----------------------------------------------------------------------------------------------------- ways of stopping


class Stopped(Exception):
    """What a script's mistake looks like."""


class Stop(TrainerCallback):
    """Ends the run after a step in one of three ways."""

    def __init__(self, step, way):
        self.step, self.way = step, way

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if self.way == "asked":
            control.should_save = control.should_training_stop = True
        elif self.way == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise Stopped


def step_of(place, at, steps, ends_of_epochs):
    """The step of a stop after `at`: for two places in five an epoch's end, for the others a share of the run."""
    ends = [end for end in ends_of_epochs if at < end <= steps]
    if place < 0.4 and ends:
        return ends[int(place / 0.4 * len(ends))]
    return min(at + 1 + int(place * (steps - at)), steps)
