"""A resumed run sees the data it would have seen: orders, random transforms, random collators, workers."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from configurations import (
    HeldGeneratorsCollator,
    Noisy,
    NoisyCollator,
    NoisySentences,
    Notes,
    OwnGeneratorCollator,
    SentenceModel,
    Shuffled,
)
from trainwright import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments


class Embedded(torch.nn.Module):
    """Looks its inputs up in a table, so that NEFTune has something to put noise on."""

    def __init__(self, dropout=0.0, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.linear, self.dropout = nn.Embedding(20, 4), nn.Linear(4, 1), nn.Dropout(dropout)

    def forward(self, x, labels=None):
        logits = self.linear(self.dropout(self.table((x.abs() * 5).long().clamp(max=19))).mean(1))
        return {"loss": (logits - labels).pow(2).mean(), "logits": logits}


class SavesAfter(TrainerCallback):
    """Saves after these steps only: a save takes longer than the rest of such a run."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


def run(model, directory, dataset, collator, resume=None, saves=(), **arguments):
    values = {
        "output_dir": str(directory),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "logging_steps": 3,
        "save_strategy": "no",
        **arguments,
    }
    held_out = Noisy(6) if "eval_strategy" in values else None
    trainer = Trainer(
        model, TrainingArguments(**values), train_dataset=dataset, eval_dataset=held_out, data_collator=collator
    )
    if saves:
        trainer.add_callback(SavesAfter(saves))
    trainer.train(resume_from_checkpoint=resume)
    lines = [
        {k: v for k, v in line.items() if k in ("loss", "grad_norm", "step")} for line in trainer.state.log_history
    ]
    optimizer = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [*model.state_dict().values(), *optimizer], lines


ACCUMULATION = (1, 3)
PLACES = {1: (2, 7, 9), 3: (1, 3, 4)}  # a checkpoint in an epoch's middle, at its end, in the next one


# (workers before, workers after, collator).
LOADERS = {
    "no workers": (0, 0, NoisyCollator),
    "2 workers": (2, 2, NoisyCollator),
    "2 then 1 worker": (2, 1, NoisyCollator),
    "own generator": (0, 0, OwnGeneratorCollator),
}
HELD = {
    "held generators": (0, 0, HeldGeneratorsCollator),
    "held in 2 then 1 worker": (2, 1, HeldGeneratorsCollator),
    "made late in 2 then 1 worker": (2, 1, OwnGeneratorCollator),
}


def assert_exact_from(places, make_model, make_data, make_collator, folder, workers=(0, 0), **settings):
    """A run that resumes after any of `places`, with another number of workers, ends as one that is not interrupted."""
    whole = run(
        make_model(), folder / "whole", make_data(), make_collator(),
        saves=places, dataloader_num_workers=workers[0], **settings,
    )  # fmt: skip
    for place in places:
        resumed = run(
            make_model(seed=9), folder / f"from-{place}", make_data(), make_collator(),
            resume=str(folder / "whole" / f"checkpoint-{place}"), dataloader_num_workers=workers[1], **settings,
        )  # fmt: skip
        assert all(map(torch.equal, whole[0], resumed[0])), place
        assert whole[1] == resumed[1], place


def assert_resume_is_exact(line_model, folder, accumulation, loader, order, **more):
    *workers, collator = (LOADERS | HELD)[loader]
    settings = {"gradient_accumulation_steps": accumulation, "train_sampling_strategy": order, **more}
    model = functools.partial(line_model, dropout=0.2)
    assert_exact_from(PLACES[accumulation], model, Noisy, collator, folder, workers, **settings)


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("order", ["random", "sequential", "group_by_length"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(line_model, tmp_path, accumulation, loader, order):
    assert_resume_is_exact(line_model, tmp_path, accumulation, loader, order)


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("loader", ["no workers", "own generator"])
@pytest.mark.parametrize("order", ["random", "group_by_length"])
@pytest.mark.parametrize("logging_steps", [1, 2])
@pytest.mark.parametrize(
    "more",
    [{"bf16": True}, {"eval_strategy": "steps", "eval_steps": 2}, {"lr_scheduler_type": "cosine", "warmup_steps": 2}],
    ids=["bf16", "evaluated in between", "cosine"],
)
def test_so_it_is_with_other_settings(line_model, tmp_path, accumulation, loader, order, logging_steps, more):
    more = {**more, "logging_steps": logging_steps}
    assert_resume_is_exact(line_model, tmp_path, accumulation, loader, order, **more)


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("loader", ["no workers", "2 then 1 worker"])
@pytest.mark.parametrize("more", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_so_it_is_with_noise_on_the_embeddings(tmp_path, accumulation, loader, more):
    assert_resume_is_exact(Embedded, tmp_path, accumulation, loader, "random", neftune_noise_alpha=5.0, **more)


@pytest.mark.parametrize("loader", HELD)
def test_so_it_is_with_a_collator_that_holds_generators_of_any_kind(line_model, tmp_path, loader):
    assert_resume_is_exact(line_model, tmp_path, 1, loader, "random")


@pytest.mark.parametrize("collator", [NoisyCollator, OwnGeneratorCollator, HeldGeneratorsCollator])
def test_a_stream_that_2_workers_share_goes_on_at_the_same_batch(line_model, tmp_path, collator):
    """Each worker reads what it had read again, and makes its batches with the same random numbers."""
    model = functools.partial(line_model, dropout=0.2)
    assert_exact_from((2, 7, 9), model, Shuffled, collator, tmp_path, (2, 2), max_steps=12)


@pytest.mark.parametrize("dataset", [Noisy, Shuffled])
def test_workers_that_stay_draw_nothing_that_a_resumed_run_would_not(line_model, tmp_path, dataset):
    """Workers that a resume starts are seeded without the global generator, as those were that had been there."""
    size = 4 if dataset is Noisy else 9  # 7 or, of two shares of 26 rows, 6 batches
    settings = {"max_steps": 12, "dataloader_persistent_workers": True, "per_device_train_batch_size": size}
    model = functools.partial(line_model, dropout=0.2)
    assert_exact_from((3, 7, 9), model, dataset, NoisyCollator, tmp_path, (2, 2), **settings)


@pytest.mark.parametrize("workers", [(0, 0), (2, 1)])
def test_our_masking_collator_masks_the_same_tokens_again(line_model, tmp_path, workers):
    transformers = pytest.importorskip("transformers")
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[MASK]", *"abcdefgh"])}
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    rows = [{"input_ids": [3 + (i + j) % 8 for j in range(6)]} for i in range(26)]
    collator = functools.partial(DataCollatorForLanguageModeling, tokenizer, seed=11, mlm_probability=0.5)
    assert_exact_from((7,), TokenGuess, lambda: rows, collator, tmp_path, workers)


class TokenGuess(nn.Module):
    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(11, 11)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.table(input_ids)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_with_a_shuffle_buffer_goes_on_where_it_was(line_model, tmp_path, workers):
    model = functools.partial(line_model, dropout=0.2)
    assert_exact_from((2, 7, 9), model, Shuffled, NoisyCollator, tmp_path, (workers, workers), max_steps=12)


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_packs_it_would_have_seen(tmp_path, accumulation, workers):
    settings = {"packing": True, "packing_length": 16, "gradient_accumulation_steps": accumulation}
    sentences = functools.partial(NoisySentences, 52)  # 26 packs, as many as samples above
    places = PLACES[accumulation]
    assert_exact_from(places, SentenceModel, sentences, lambda: None, tmp_path, (workers, workers), **settings)


class Counted(IterableDataset):
    """A stream that workers share by turns; each sample says which it is."""

    def __init__(self, length=48):
        self.length = length

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, self.length, every):
            yield {"x": torch.full((3,), index / self.length), "labels": torch.rand(1)}


class Remembers(nn.Module):
    """Notes the numbers of the samples that it was trained on."""

    def __init__(self, length=48):
        super().__init__()
        self.linear, self.length, self.seen = nn.Linear(3, 1), length, []

    def forward(self, x, labels=None):
        self.seen += (x[:, 0] * self.length).round().int().tolist()
        return {"loss": (self.linear(x) - labels).pow(2).mean()}


@pytest.mark.parametrize("sizes", [(4, 6), (4, 8), (6, 2), (2, 3), (4, 6, 3)])
def test_a_stream_that_workers_share_loses_and_repeats_no_sample_when_the_batch_size_changes(tmp_path, sizes):
    """Three batches of each size (the last one: until the stream ends), each run going on from the one before."""
    seen, resume, step = [], None, 0
    for number, size in enumerate(sizes):
        model, directory = Remembers(), tmp_path / str(number)
        step += 3
        is_last = number == len(sizes) - 1
        options = {"max_steps": step + 24} if is_last else {"saves": (step,), "max_steps": step}
        run(
            model, directory, Counted(), Notes(), resume=resume, dataloader_num_workers=2,
            per_device_train_batch_size=size, learning_rate=0.0, **options,
        )  # fmt: skip
        seen += model.seen
        resume = str(directory / f"checkpoint-{step}")
    assert sorted(seen[:48]) == list(range(48))


def test_a_stream_goes_on_exactly_after_the_batch_size_changed_once(tmp_path, line_model):
    options = {"dataloader_num_workers": 2, "max_steps": 6}
    model = line_model(dropout=0.2)
    run(model, tmp_path / "1", Counted(), NoisyCollator(), saves=(2,), per_device_train_batch_size=4, **options)
    after = {"per_device_train_batch_size": 6, "saves": (4,), **options}
    first = str(tmp_path / "1" / "checkpoint-2")
    whole = run(line_model(dropout=0.2), tmp_path / "2", Counted(), NoisyCollator(), resume=first, **after)
    second = str(tmp_path / "2" / "checkpoint-4")
    again = run(line_model(dropout=0.2, seed=9), tmp_path / "3", Counted(), NoisyCollator(), resume=second, **after)
    assert all(map(torch.equal, whole[0], again[0]))
    assert whole[1] == again[1]


def test_another_number_of_workers_over_a_stream_says_that_samples_are_lost(tmp_path, line_model, caplog):
    options = {"max_steps": 4, "dataloader_num_workers": 2}
    run(line_model(), tmp_path, Counted(), NoisyCollator(), saves=(2,), **options)
    resume = str(tmp_path / "checkpoint-2")
    options["dataloader_num_workers"] = 1
    run(line_model(), tmp_path / "again", Counted(), NoisyCollator(), resume=resume, **options)
    assert "The number of workers changed" in caplog.text and "others not at all" in caplog.text
