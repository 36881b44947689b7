"""A resumed run sees the data it would have seen: orders, random transforms, random collators, workers."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from trainwright import Trainer, TrainingArguments


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


def run(model, directory, dataset, collator, resume=None, **arguments):
    values = {
        "output_dir": str(directory),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "logging_steps": 3,
        "save_steps": 1,
        **arguments,
    }
    held_out = Noisy(6) if "eval_strategy" in values else None
    trainer = Trainer(
        model, TrainingArguments(**values), train_dataset=dataset, eval_dataset=held_out, data_collator=collator
    )
    trainer.train(resume_from_checkpoint=resume)
    lines = [
        {k: v for k, v in line.items() if k in ("loss", "grad_norm", "step")} for line in trainer.state.log_history
    ]
    optimizer = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [*model.state_dict().values(), *optimizer], lines


ACCUMULATION = (1, 3)
PLACES = {1: (2, 7, 9), 3: (1, 3, 4)}  # a checkpoint in an epoch's middle, at its end, in the next one


# (workers before, workers after, collator). A collator's own generator is copied into each worker, where nobody can ask
# for its state, so that pair is not promised.
LOADERS = {
    "no workers": (0, 0, NoisyCollator),
    "2 workers": (2, 2, NoisyCollator),
    "2 then 1 worker": (2, 1, NoisyCollator),
    "own generator": (0, 0, OwnGeneratorCollator),
}


def assert_resume_is_exact(line_model, tmp_path, at, accumulation, loader, order, **more):
    *workers, collator = LOADERS[loader]
    settings = {"gradient_accumulation_steps": accumulation, "train_sampling_strategy": order, **more}
    whole = run(line_model(dropout=0.2), tmp_path, Noisy(), collator(), dataloader_num_workers=workers[0], **settings)
    resumed = run(
        line_model(dropout=0.2, seed=9),
        tmp_path / "resumed",
        Noisy(),
        collator(),
        resume=str(tmp_path / f"checkpoint-{PLACES[accumulation][at]}"),
        dataloader_num_workers=workers[1],
        **settings,
    )
    assert all(map(torch.equal, whole[0], resumed[0]))
    assert whole[1] == resumed[1]


@pytest.mark.parametrize("at", (0, 1, 2))
@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("order", ["random", "sequential", "group_by_length"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(line_model, tmp_path, at, accumulation, loader, order):
    assert_resume_is_exact(line_model, tmp_path, at, accumulation, loader, order)


@pytest.mark.parametrize("at", (0, 1, 2))
@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("loader", ["no workers", "own generator"])
@pytest.mark.parametrize("order", ["random", "group_by_length"])
@pytest.mark.parametrize("logging_steps", [1, 2])
@pytest.mark.parametrize(
    "more",
    [{"bf16": True}, {"eval_strategy": "steps", "eval_steps": 2}, {"lr_scheduler_type": "cosine", "warmup_steps": 2}],
    ids=["bf16", "evaluated in between", "cosine"],
)
def test_so_it_is_with_other_settings(line_model, tmp_path, at, accumulation, loader, order, logging_steps, more):
    more = {**more, "logging_steps": logging_steps}
    assert_resume_is_exact(line_model, tmp_path, at, accumulation, loader, order, **more)


@pytest.mark.parametrize("at", [2, 7, 9])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_with_a_shuffle_buffer_goes_on_where_it_was(line_model, tmp_path, at, workers):
    settings = {"max_steps": 12, "dataloader_num_workers": workers}
    whole = run(line_model(dropout=0.2), tmp_path, Shuffled(), NoisyCollator(), **settings)
    checkpoint = str(tmp_path / f"checkpoint-{at}")
    resumed = run(
        line_model(dropout=0.2, seed=9),
        tmp_path / "resumed",
        Shuffled(),
        NoisyCollator(),
        resume=checkpoint,
        **settings,
    )
    assert all(map(torch.equal, whole[0], resumed[0]))
    assert whole[1] == resumed[1]


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


@pytest.mark.parametrize("at", (0, 1, 2))
@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_packs_it_would_have_seen(tmp_path, at, accumulation, workers):
    settings = {
        "packing": True,
        "packing_length": 16,
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": workers,
    }
    whole = run(SentenceModel(), tmp_path, NoisySentences(52), None, **settings)  # 26 packs, as many as samples above
    checkpoint = str(tmp_path / f"checkpoint-{PLACES[accumulation][at]}")
    resumed = run(SentenceModel(seed=9), tmp_path / "resumed", NoisySentences(52), None, resume=checkpoint, **settings)
    assert all(map(torch.equal, whole[0], resumed[0]))
    assert whole[1] == resumed[1]
