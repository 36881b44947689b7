"""Three columns from one seed: a plain torch loop, ours, and the installed `transformers`.

Owns: the models and data of the comparison, the plain loop, and running one column. Leaves to others: what must be
equal (the tests), what differs by choice (`test_differences.py`, `docs/parity.md`). Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

IGNORED = -100
SEED = 42  # the default of both libraries
NUM_SAMPLES, BATCH_SIZE = 30, 4  # eight micro-batches, the last of two samples; in groups of three the last has two
Batch = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------------------- the cases ----


class Regressor(nn.Module):
    """A linear layer behind dropout that returns its mean squared error."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(3), nn.Linear(3, 1), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        prediction = self.linear(self.dropout(self.norm(x)))  # (batch, 1)
        loss = {} if labels is None else {"loss": ((prediction - labels) ** 2).mean()}
        return {**loss, "logits": prediction}


class Classifier(nn.Module):
    """Three classes from three numbers, without `transformers`; label smoothing needs classes."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(3, 3), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.linear(self.dropout(x))  # (batch, classes)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def _transformers_model(kind: str, dropout: float) -> nn.Module:
    import transformers

    model: Any
    options: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0}
    if kind == "bert":
        options.update(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
        options.update(max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        return transformers.BertForSequenceClassification(transformers.BertConfig(**options))
    if kind == "gpt2":
        options.update(n_layer=1, n_head=2, n_embd=16, n_positions=16, bos_token_id=1, eos_token_id=1)
        options.update(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
    options.update(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=1)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**options, dropout_rate=dropout))
    for parameter in model.parameters():  # large enough that generated tokens depend on the input
        nn.init.normal_(parameter, std=0.5)
    return model  # type: ignore[no-any-return]


def build_model(kind: str, dropout: float = 0.1) -> nn.Module:
    """The untrained model of a case, the same weights each time."""
    torch.manual_seed(7)
    own = {"regression": Regressor, "classifier": Classifier}
    return own[kind](dropout) if kind in own else _transformers_model(kind, dropout)


def build_data(kind: str, num_samples: int = NUM_SAMPLES, first_label: bool = False, seed: int = 3) -> list[Batch]:
    """Samples of a case; those of language models are 4 to 9 tokens long.

    `first_label`: keep the first label of each GPT-2 sequence, which the model never predicts (see test_differences).
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(num_samples):
        if kind in ("regression", "classifier"):
            x = torch.randn(3, generator=generator)
            labels = x.sum().reshape(1) if kind == "regression" else x.argmax()
            samples.append({"x": x, "labels": labels})
            continue
        ids = torch.randint(2, 32, (4 + (index * 5) % 6,), generator=generator)  # (length,)
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind == "bert":
            labels = ids[0] % 3
        else:
            labels = ids.clone() if kind == "gpt2" else ids.flip(0)[: 2 + index % 4]
            if kind == "gpt2" and not first_label:
                labels[0] = IGNORED
        samples.append({**sample, "labels": labels})
    return samples


def collate(samples: list[Batch]) -> Batch:
    """Samples to a batch; rows of different length are padded on the right."""
    batch = {}
    for name, value in samples[0].items():
        rows = [sample[name] for sample in samples]
        padding = IGNORED if name == "labels" else 0
        if value.dim() == 1:
            batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)  # (batch, length)
        else:
            batch[name] = torch.stack(rows)  # (batch,)
    return batch


# -------------------------------------------------------------------------------------------------- the plain loop ----


def learning_rate_factor(name: str, step: int, warmup: int, total: int, options: dict[str, Any]) -> float:
    """The documented schedules in closed form: the share of the top learning rate that step `step` (from 0) uses."""
    if name == "constant":
        return 1.0
    if name == "warmup_stable_decay":
        decay = options["num_decay_steps"]
        floor = float(options.get("min_lr_ratio", 0.0))
        share = step / max(warmup, 1) if step < warmup else 1.0
        if step >= total - decay:
            share = 0.5 * (1 + math.cos(math.pi * (step - total + decay) / decay))
        return float(floor + (1 - floor) * share)
    if step < warmup:
        if name == "cosine_warmup_with_min_lr":  # starts above zero
            start = options["warmup_lr_rate"]
            return float(start + (1 - start) * step / max(warmup - 1, 1))
        return step / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    if name == "constant_with_warmup":
        return 1.0
    if name == "linear":
        return 1 - progress
    if name == "cosine":
        return cosine
    if name == "cosine_with_restarts":
        return 0.5 * (1 + math.cos(math.pi * (progress * options["num_cycles"] % 1.0)))
    if name == "polynomial":
        floor = options["lr_end"] / options["lr"]
        return float(floor + (1 - floor) * (1 - progress) ** options["power"])
    if name == "inverse_sqrt":
        timescale = warmup or 10_000
        return 1 / math.sqrt((step + timescale - warmup) / timescale)
    if name == "cosine_warmup_with_min_lr":  # warmup is over with its last step, not with the step after it
        cosine = 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (total - warmup)))
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        floor = options["min_lr_rate"]
        return float(floor + (1 - floor) * cosine)
    raise AssertionError(name)


@dataclass
class Run:
    """What a column shows: one dict per training log line, the final weights, the Trainer (None for the plain loop)."""

    logs: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    trainer: Any = None
    output: Any = None


@dataclass
class Settings:
    """The options of a row, by their names in TrainingArguments."""

    num_train_epochs: float = 1.5
    gradient_accumulation_steps: int = 1
    label_smoothing_factor: float = 0.0
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    max_grad_norm: float = 0.5
    # The bias of an attention key has no gradient (softmax ignores it) but the last bits of rounding, which Adam would
    # blow up to the full learning rate; this keeps them small.
    adam_epsilon: float = 1e-4

    def arguments(self) -> dict[str, Any]:
        """These options with those that every row shares; `lr_scheduler_kwargs` is left out where it is empty."""
        shared = {
            "per_device_train_batch_size": BATCH_SIZE, "per_device_eval_batch_size": BATCH_SIZE, "logging_steps": 1,
            "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": SEED,
        }  # fmt: skip
        return {**shared, **{name: value for name, value in vars(self).items() if value != {}}}


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter `name`: not to biases and norms."""
    return "bias" not in name and "norm" not in name.lower() and "ln_" not in name


def run_plain(
    kind: str,
    settings: Settings,
    dropout: float = 0.1,
    by_items: bool | None = None,
    data: dict[str, Any] | None = None,
) -> Run:
    """Train with nothing but torch. `by_items`: every label of an update weighs the same (as for GPT-2), else every
    micro-batch."""
    samples, model = build_data(kind, **(data or {})), build_model(kind, dropout)
    by_items = kind == "gpt2" if by_items is None else by_items
    torch.manual_seed(SEED)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if decays(name)], "weight_decay": settings.weight_decay},
            {"params": [p for name, p in named if not decays(name)], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        eps=settings.adam_epsilon,
    )
    accumulation = settings.gradient_accumulation_steps
    updates_per_epoch = math.ceil(math.ceil(len(samples) / BATCH_SIZE) / accumulation)
    total = math.ceil(settings.num_train_epochs * updates_per_epoch)
    options = {**settings.lr_scheduler_kwargs, "lr": settings.learning_rate}

    def num_items(batch: Batch) -> torch.Tensor:
        labels = batch["labels"][:, 1:] if kind == "gpt2" else batch["labels"]  # a first token is never predicted
        return (labels != IGNORED).sum()

    def loss_of(batch: Batch) -> torch.Tensor:
        outputs, labels = model(**batch), batch["labels"]
        if not settings.label_smoothing_factor:
            return outputs["loss"]  # type: ignore[no-any-return]
        logits = outputs["logits"]
        if kind == "gpt2":  # position t predicts token t+1
            logits, labels = logits[:, :-1], labels[:, 1:]
        return nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), label_smoothing=settings.label_smoothing_factor
        )

    logs: list[dict[str, float]] = []
    model.train()
    for epoch in range(math.ceil(settings.num_train_epochs)):
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        torch.empty((), dtype=torch.int64).random_()  # the base seed that a DataLoader draws for its workers
        batches = [
            collate([samples[i] for i in order[start : start + BATCH_SIZE]])
            for start in range(0, len(order), BATCH_SIZE)
        ]
        for start in range(0, len(batches), accumulation):
            if len(logs) == total:
                break
            window = batches[start : start + accumulation]
            shares = [num_items(batch) if by_items else torch.tensor(1) for batch in window]
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate_factor(
                    settings.lr_scheduler_type, len(logs), settings.warmup_steps, total, options
                )
            update_loss = torch.zeros(())
            for batch, share in zip(window, shares):
                loss = loss_of(batch) * share / sum(shares)
                loss.backward()  # type: ignore[no-untyped-call]
                update_loss += loss.detach()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            logs.append({"loss": update_loss.item(), "grad_norm": grad_norm.item(), "learning_rate": group["lr"]})
    return Run(logs, weights_of(model))


# ------------------------------------------------------------------------------------------------ the two Trainers ----


def named(name: str, text: str) -> str:
    """The message of a failed comparison, with the name of what was compared."""
    return f"{name}: {text}"


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def training_logs(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The log lines of training steps, with the three numbers every column has."""
    return [{key: line[key] for key in ("loss", "grad_norm", "learning_rate")} for line in history if "loss" in line]


def library(column: str) -> Any:
    """The module that a column's Trainer comes from."""
    if column == "ours":
        import trainwright

        return trainwright
    import transformers

    return transformers


@pytest.fixture(scope="session")
def reference() -> Any:
    """The installed `transformers`."""
    return library("reference")


@pytest.fixture(autouse=True)
def own_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """4.55 leaves its precision in the environment, where the next Trainer of the process finds it; undo that."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def is_older(reference: Any) -> bool:
    """Whether the installed `transformers` is a 4.x: it rounds the losses it logs to four digits."""
    return int(reference.__version__.split(".")[0]) < 5


@dataclass
class Columns:
    """Builds and runs the columns of a row in directories of their own."""

    directory: Path
    loss_tolerance: float
    build_model = staticmethod(build_model)
    build_data = staticmethod(build_data)
    collate = staticmethod(collate)
    settings = staticmethod(Settings)
    plain = staticmethod(run_plain)
    weights_of = staticmethod(weights_of)
    training_logs = staticmethod(training_logs)

    def trainer(
        self,
        column: str,
        kind: str,
        settings: Settings | None = None,
        dropout: float = 0.1,
        data: dict[str, Any] | None = None,
        given: dict[str, Any] | None = None,
        seq2seq: bool = False,
        cls: type | None = None,
        **arguments: Any,
    ) -> Any:
        """The Trainer of a column ("ours", "reference"); `given` goes to Trainer, `arguments` to TrainingArguments."""
        source, name = library(column), "Seq2Seq" * seq2seq
        values = {"output_dir": str(self.directory / column), **(settings or Settings()).arguments(), **arguments}
        args = getattr(source, f"{name}TrainingArguments")(**values)
        objects = {
            "model": build_model(kind, dropout),
            "train_dataset": build_data(kind, **(data or {})),
            "eval_dataset": build_data(kind, num_samples=11, seed=5),
            "data_collator": collate,
        }
        return (cls or getattr(source, f"{name}Trainer"))(args=args, **{**objects, **(given or {})})

    def run(self, column: str, kind: str, settings: Settings | None = None, resume: Any = None, **options: Any) -> Run:
        """Train a column. `adjust(trainer)` is called in between."""
        adjust: Callable[[Any], Any] = options.pop("adjust", lambda trainer: None)
        trainer = self.trainer(column, kind, settings, **options)
        adjust(trainer)
        output = trainer.train(resume_from_checkpoint=resume)
        return Run(training_logs(trainer.state.log_history), weights_of(trainer.model), trainer, output)

    def assert_same(self, ours: Run, other: Run, is_reference: bool = False) -> None:
        """Every logged loss, grad norm and learning rate and the final weights agree to 1e-6 (or what was rounded)."""
        assert len(ours.logs) == len(other.logs) > 0
        for key in ("loss", "grad_norm", "learning_rate"):
            tolerance = self.loss_tolerance if is_reference and key == "loss" else 1e-6
            left, right = (torch.tensor([line[key] for line in run.logs], dtype=torch.float64) for run in (ours, other))
            torch.testing.assert_close(left, right, atol=tolerance, rtol=1e-6, msg=partial(named, key))
        self.assert_same_weights(ours, other)

    @staticmethod
    def assert_same_weights(ours: Run, other: Run) -> None:
        assert ours.weights.keys() == other.weights.keys()
        for name, weight in ours.weights.items():
            torch.testing.assert_close(weight, other.weights[name], atol=1e-6, rtol=1e-6, msg=partial(named, name))


@pytest.fixture
def columns(tmp_path: Path, is_older: bool) -> Columns:
    return Columns(tmp_path, loss_tolerance=5.1e-5 if is_older else 1e-6)
