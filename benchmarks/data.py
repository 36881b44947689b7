"""Measure what the layout of the data costs: padding, tokens per second, time spent waiting for batches.

Owns: lengths, a small Llama of `transformers`, the order of measurements, the tables. Leaves to others: nothing; it
runs by itself.

    python benchmarks/data.py                  everything, in about five minutes on two cores
    python benchmarks/data.py --counts         padding only, exact on any machine, in seconds
    python benchmarks/data.py --rounds 5       more rounds, where the machine is busy

Padding is counted over a whole epoch. Tokens per second are those of text, without padding, on one thread, and come
from rounds in which all layouts take turns. Waiting is the share of the time that a loop waits
for batches: from asking the iterator of the epoch until the batch is there, on the thread of the loop, so that it means
the same in every loop, whoever makes and receives the batches. Beside it stands all of the time that is no step, which
holds what a loop might hide elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

PACK, VOCABULARY, WIDTH, NUM_LAYERS, NUM_HEADS = 2048, 256, 128, 2, 4
SLEEP_S, STEP_S, BATCH = 0.005, 0.04, 8  # of one sample's transform; of one step; samples: 20 ms per batch, two workers
MASKED = "packing, mask"
WARM_UP = 8  # micro-batches that are not measured


def lognormal_lengths(num_samples: int, mean: float = 400, spread: float = 500) -> list[int]:
    """Lengths in tokens with this mean and standard deviation, at most `PACK`."""
    variance = math.log(1 + (spread / mean) ** 2)
    drawn = torch.empty(num_samples).log_normal_(
        math.log(mean) - variance / 2, variance**0.5, generator=torch.Generator().manual_seed(0)
    )
    return drawn.long().clamp(1, PACK).tolist()  # type: ignore[no-any-return]


class Texts(Dataset[dict[str, list[int]]]):
    """Samples of the given lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [(index + place) % (VOCABULARY - 1) + 1 for place in range(self.lengths[index])]}


def pad(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch as wide as its longest sample."""
    rows = [torch.tensor(sample["input_ids"]) for sample in samples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (batch, longest)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100), "attention_mask": (ids != 0).long()}


def make_model() -> nn.Module:
    """A small Llama of `transformers`, with the attention that it has unless asked for another: sdpa."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": NUM_LAYERS}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=PACK, num_attention_heads=NUM_HEADS, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def layouts(batch_size: int) -> dict[str, dict[str, Any]]:
    """The arguments of each way to lay out batches of about as many tokens."""
    num_packs = max(1, round(batch_size * 400 / PACK))
    packing = {"per_device_train_batch_size": num_packs, "packing": True, "packing_length": PACK}
    return {
        "padding": {"per_device_train_batch_size": batch_size},
        "length grouping": {"per_device_train_batch_size": batch_size, "group_by_length": True},
        MASKED: packing,
        "packing": packing,
    }


@contextlib.contextmanager
def attention_of(layout: str) -> Iterator[None]:
    """Within the block, `MASKED` packs as models do whose layers cannot attend within each sample by itself."""
    from trainwright.interop import packed_attention

    tried = packed_attention.why_not_per_sample
    if layout == MASKED:
        packed_attention.why_not_per_sample = lambda *_: "the benchmark measures the mask"
    try:
        yield
    finally:
        packed_attention.why_not_per_sample = tried


def trainer_for(layout: str, batch_size: int, lengths: list[int], directory: str, num_steps: int) -> Any:
    """A trainer that notes when its steps begin, in seconds of the processor, and how many tokens of text they have."""
    from trainwright import Trainer, TrainingArguments

    class Noting(Trainer):
        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            packs = inputs.get("sample_lengths")
            num_tokens = sum(map(sum, packs)) if packs else int(inputs["attention_mask"].sum())
            self.calls.append((time.process_time(), num_tokens))
            return super().training_step(model, inputs, num_items_in_batch)

    args = TrainingArguments(
        directory,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        max_steps=num_steps,
        logging_steps=1000,
        **layouts(batch_size)[layout],
    )
    trainer = Noting(make_model(), args, train_dataset=Texts(lengths), data_collator=None if args.packing else pad)
    trainer.calls: list[tuple[float, int]] = []
    return trainer


def count_places(batch_size: int, lengths: list[int]) -> dict[str, tuple[int, int]]:
    """`(places, tokens)` of one epoch in each layout. Reads lengths and orders, and makes no batch."""
    counts = {}
    for layout in layouts(batch_size):
        with tempfile.TemporaryDirectory() as directory:
            loader = trainer_for(layout, batch_size, lengths, directory, 1).get_train_dataloader()
        if layout.startswith("packing"):
            counts[layout] = (len(loader.dataset) * PACK, loader.dataset.plan.num_tokens)
        else:
            widths = [[lengths[index] for index in batch] for batch in loader.batch_sampler]
            counts[layout] = (sum(max(batch) * len(batch) for batch in widths), sum(lengths))
    return counts


def tokens_per_s(layout: str, batch_size: int, lengths: list[int], num_steps: int) -> float:
    """Tokens of text per second of training, set-up left out. Seconds are those of the processor, on one thread, so
    that what else runs on the machine does not count."""
    with tempfile.TemporaryDirectory() as directory, quiet(), attention_of(layout):
        trainer = trainer_for(layout, batch_size, lengths, directory, num_steps + 1)
        trainer.train()
    calls = trainer.calls
    return sum(tokens for _, tokens in calls[:-1]) / (calls[-1][0] - calls[0][0])


class Slow(Dataset[dict[str, torch.Tensor]]):
    """Samples that take `SLEEP_S` to make, as decoding an image does."""

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(SLEEP_S)
        return {"x": torch.ones(16), "labels": torch.ones(1)}


class Waiting(nn.Module):
    """A step that takes `STEP_S` of a device's time and none of the processor's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 1)
        self.begun: list[float] = []
        self.slept: list[float] = []  # seconds, a little more than asked for

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.begun.append(time.perf_counter())
        time.sleep(STEP_S)
        self.slept.append(time.perf_counter() - self.begun[-1])
        return {"loss": (self.linear(x) - labels).pow(2).mean()}


class Timed:
    """The iterator that a loop asks for batches, and how long each answer took, on the loop's own thread."""

    def __init__(self, iterator: Iterator[Any], waits: list[tuple[float, float]]) -> None:
        self.iterator, self.waits = iterator, waits  # waits: (when, seconds)

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> Any:
        begin = time.perf_counter()
        try:
            return next(self.iterator)
        finally:
            self.waits.append((begin, time.perf_counter() - begin))


def timed_trainer(trainer_class: type[Any], waits: list[tuple[float, float]]) -> type[Any]:
    """A Trainer that asks for its batches through `Timed`: the hook is handed the iterator of the epoch."""

    class TimedTrainer(trainer_class):  # type: ignore[misc]
        def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            return super().get_batch_samples(Timed(epoch_iterator, waits), *args, **kwargs)

    return TimedTrainer


class Waited(NamedTuple):
    """Of the time of a loop, in shares: 0 none, 1 all."""

    for_batches: float  # between asking for a batch and having it
    besides_steps: float  # whatever is no step: waiting, the loop's own work, and what others take from it meanwhile


def wait_share(package: str, accumulation: int, num_batches: int) -> Waited:
    """What a loop waits when workers make its batches. `package`: "torch" for a bare loop."""
    model, total, waits = Waiting(), WARM_UP + num_batches, []
    with quiet():
        if package == "torch":
            optimizer = torch.optim.AdamW(model.parameters())
            loader = DataLoader(Slow(), BATCH, shuffle=True, num_workers=2)
            for number, batch in enumerate(Timed(iter(loader), waits), start=1):
                (model(**batch)["loss"] / accumulation).backward()
                if number % accumulation == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                if number == total:
                    break
        else:
            library = importlib.import_module(package)
            with tempfile.TemporaryDirectory() as directory:
                args = library.TrainingArguments(
                    directory,
                    max_steps=total // accumulation,
                    gradient_accumulation_steps=accumulation,
                    per_device_train_batch_size=BATCH,
                    dataloader_num_workers=2,
                    logging_steps=1000,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                )
                timed_trainer(library.Trainer, waits)(model, args, train_dataset=Slow()).train()
    if len(waits) < total:
        raise RuntimeError(f"{package} took {total} batches, of which {len(waits)} through get_batch_samples.")
    begin, end = model.begun[WARM_UP - 1], model.begun[total - 1]
    waited = sum(seconds for when, seconds in waits if begin <= when < end)
    stepped = sum(seconds for when, seconds in zip(model.begun, model.slept) if begin <= when < end)
    return Waited(waited / (end - begin), 1 - stepped / (end - begin))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="count padding only; measure no time")
    parser.add_argument("--samples", type=int, default=20_000, help="samples whose padding is counted")
    parser.add_argument("--steps", type=int, default=6, help="steps of a measurement of tokens per second")
    parser.add_argument("--rounds", type=int, default=3, help="times that each measurement is taken, in turns")
    parser.add_argument("--batches", type=int, default=64, help="micro-batches over which waiting is measured")
    options = parser.parse_args()
    torch.set_num_threads(1)

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; lengths lognormal(400, 500), at most {PACK}\n"
    )
    print(f"{'batch':>5}  {'layout':<18}{'padding':>8}{'places per token':>18}{'fewer than padding':>20}")
    for batch_size in (8, 16, 32):
        counts = count_places(batch_size, lognormal_lengths(options.samples))
        places, tokens = counts["padding"]
        for name, (own_places, own_tokens) in counts.items():
            per_token = own_places / own_tokens
            saved = places / tokens / per_token
            print(f"{batch_size:>5}  {name:<18}{1 - own_tokens / own_places:>8.2%}{per_token:>18.3f}{saved:>19.2f}x")
    if options.counts:
        return

    print(f"\n{'batch':>5}  {'layout':<18}{'tokens per s':>13}{'of padding':>12}")
    lengths = lognormal_lengths(2000)
    for batch_size in (8, 16):
        names = list(layouts(batch_size))
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name in names:
                num_steps = options.steps * (4 if name != "padding" else 1)  # their steps are shorter
                speeds[name].append(tokens_per_s(name, batch_size, lengths, num_steps))
        for name in names:
            ratio = statistics.median(own / padded for own, padded in zip(speeds[name], speeds["padding"]))
            print(f"{batch_size:>5}  {name:<18}{statistics.median(speeds[name]):>13,.0f}{ratio:>11.2f}x")

    print(f"\nWaiting for data: {1000 * SLEEP_S:.0f} ms per sample, {BATCH} samples per batch, 2 workers,", end=" ")
    print(f"{1000 * STEP_S:.0f} ms per step")
    print(f"{'accumulation':>12}  {'loop':<16}{'share of time':>14}{'all but steps':>15}")
    for accumulation in (1, 8):
        found: dict[str, list[Waited]] = {"torch": [], "transformers": [], "trainwright": []}
        for _ in range(options.rounds):
            for package, shares in found.items():
                if importlib.util.find_spec(package) is not None:
                    shares.append(wait_share(package, accumulation, options.batches))
        for package, shares in found.items():
            row = f"{accumulation:>12}  {'bare ' * (package == 'torch') + package:<16}"
            if not shares:
                print(f"{row}{'not installed':>14}")
                continue
            waited, besides = (statistics.median(values) for values in zip(*shares))
            print(f"{row}{waited:>14.2%}{besides:>15.2%}")


if __name__ == "__main__":
    main()
